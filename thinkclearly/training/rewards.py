"""Rewards of pictures, by the names that a recipe gives them.

A reward is a function as TRL has it: `f(prompts, completions, **columns)` → a number or None for each completion.
Completions are RGB pictures, columns the records' other columns with a value for each completion; None means that the
reward does not apply. Knows nothing of groups, advantages or how pictures came about.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image

from thinkclearly.data.shape_score import scene_score
from thinkclearly.data.shapes import Scene, ShapeEdit
from thinkclearly.evaluation.benchmarks.towers import Clip
from thinkclearly.evaluation.benchmarks.vqa import VqaScorer

Reward = Callable[..., list[float | None]]

THREADS = 16  # requests at a time, as the original's


def load_rewards(
    names: Iterable[str], device: str | torch.device = "cpu", own: Iterable[str] = ()
) -> dict[str, Reward]:
    """Reward functions by name, models loaded.

    Args:
        names: `shapes`, `shape_edits`, `vqa:MODEL`, `clip:MODEL` (Hub ids or folders) or `http:URL`. They may come
            from anywhere: none of them runs code that came with a model or a recipe.
        own: `module:function` of the user's own. The module is imported, so these names must come from the command
            line, never from a file that others wrote.

    Raises:
        ValueError: an unknown name, a name given twice, a module or function that is not there.
    """
    names, own = list(names), list(own)
    twice = {name for name in names + own if (names + own).count(name) > 1}
    if twice:
        raise ValueError(f"reward {', '.join(sorted(twice))} given twice; give it once, with a weight")
    return {name: _built_in(name, device) for name in names} | {name: _own(name) for name in own}


def _built_in(name: str, device: str | torch.device) -> Reward:
    kind, _, argument = name.partition(":")
    if name in ("shapes", "shape_edits"):
        return {"shapes": shapes, "shape_edits": shape_edits}[name]
    if kind == "vqa" and argument:
        return partial(_without_columns, VqaScorer(argument, device).score)
    if kind == "clip" and argument:
        return partial(_without_columns, partial(_cosines, Clip(argument, device)))
    if kind == "http" and argument.startswith(("http://", "https://")):
        return partial(_without_columns, HttpScorer(argument).score)
    raise ValueError(
        f"reward {name!r} is none of shapes, shape_edits, vqa:MODEL, clip:MODEL and http:URL (http:http://…). A "
        "function of your own is given on the command line: --own_rewards module:function."
    )


def _own(name: str) -> Reward:
    module, _, function = name.partition(":")
    if not module or not function.isidentifier():
        raise ValueError(f"--own_rewards {name}: expected module:function, such as my_rewards:brightness")
    try:
        reward = getattr(import_module(module), function, None)
    except ImportError as error:
        raise ValueError(
            f"--own_rewards {name}: cannot import {module} ({error}). Python finds a file of the current folder with "
            "PYTHONPATH=."
        ) from error
    if not callable(reward):
        raise ValueError(f"--own_rewards {name}: {module} has no function {function}")
    return reward


# Of the built-in shapes


def shapes(
    prompts: list[str], completions: list[Image.Image], scene: list[str | None] | None = None, **columns
) -> list[float | None]:
    """How much of the true scene a picture shows, in [0, 1]: `scene_score` has the four quarters.

    Args:
        scene: `Scene.to_json` of each prompt's scene; None where it has none.
    """
    return [
        None if text is None else scene_score(picture, _read(Scene, text, "scene", prompt))
        for prompt, picture, text in zip(prompts, completions, _column(scene, "shapes", "scene", prompts))
    ]


def shape_edits(
    prompts: list[str], completions: list[Image.Image], edit: list[str | None] | None = None, **columns
) -> list[float | None]:
    """Half for an edit that is done (`ShapeEdit.is_done`), half for the share of pixels that stayed exactly.

    Those are the pixels outside the true mask. In [0, 1]; the target itself has 1, the untouched source 0.5.

    Args:
        completions: results at the source's own size.
        edit: `ShapeEdit.to_json` of each instruction's edit; None where it has none.
    """
    return [
        None if text is None else _edit_score(picture, _read(ShapeEdit, text, "edit", prompt))
        for prompt, picture, text in zip(prompts, completions, _column(edit, "shape_edits", "edit", prompts))
    ]


def _edit_score(picture: Image.Image, edit: ShapeEdit) -> float:
    source, _, mask = map(np.asarray, edit.render(*picture.size))
    same = (np.asarray(picture.convert("RGB")) == source).all(-1)[mask == 0]
    return 0.5 * edit.is_done(picture) + 0.5 * (float(same.mean()) if same.size else 1.0)


def _column(values: list | None, reward: str, name: str, prompts: list[str]) -> list:
    if values is None:
        raise ValueError(
            f"reward {reward} needs the column {name}, which these records lack; it judges the built-in shapes alone"
        )
    return values


def _read(kind: type[Scene] | type[ShapeEdit], text: str, column: str, prompt: str):
    try:
        return kind.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prompt {prompt!r}: its {column} is not what {kind.__name__}.to_json writes ({error!r})"
        ) from error


# Of any prompt


def _without_columns(score, /, prompts: list[str], completions: list[Image.Image], **columns) -> list[float]:
    return score(prompts, completions)


def _cosines(clip: Clip, prompts: list[str], pictures: list[Image.Image]) -> list[float]:
    """Cosine of the vectors of prompt and picture, in [-1, 1]."""
    return (clip.texts(prompts) * clip.images(pictures)).sum(-1).tolist()


@dataclass(frozen=True)
class HttpScorer:
    """Scores from a server that speaks [FocusDiff's](https://github.com/wendell0218/FocusDiff) protocol.

    A POST for each picture, `{"features": {}, "tensorFeatures": {"images": {"shapes": [1], "byteValues": PNG in
    base64}, "captions": {"shapes": [1], "stringValues": [prompt]}}}`; the reply is `{"success": true, "resultMap":
    {"scores": number}}`.

    Args:
        tries: per picture. The original scores 0 after them, and learns from it.
        wait: seconds before the second try, twice as many before each further one.
        timeout: seconds that the server may be silent.
    """

    url: str
    tries: int = 5
    wait: float = 1.0
    timeout: float = 60.0

    def score(self, prompts: list[str], pictures: list[Image.Image]) -> list[float]:
        """As the server has it for each picture and its prompt.

        Raises:
            RuntimeError: a picture got no score in any of the tries.
        """
        with httpx.Client(timeout=self.timeout) as client, ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(partial(self._ask, client), prompts, pictures))

    def _ask(self, client: httpx.Client, prompt: str, picture: Image.Image) -> float:
        png = io.BytesIO()
        picture.save(png, "PNG")
        images = {"shapes": [1], "byteValues": base64.b64encode(png.getvalue()).decode()}
        captions = {"shapes": [1], "stringValues": [prompt]}
        body = {"features": {}, "tensorFeatures": {"images": images, "captions": captions}}
        for number in range(self.tries):
            if number:
                time.sleep(self.wait * 2 ** (number - 1))
            try:
                return _score(client.post(self.url, json=body))
            except (httpx.HTTPError, ValueError) as error:
                last = error
        raise RuntimeError(
            f"the reward server {self.url} gave no score for {prompt!r} in {self.tries} tries; the last time: "
            f"{str(last) or type(last).__name__}. Is it running, and does it answer as docs/grpo.md says?"
        ) from last


def _score(reply: httpx.Response) -> float:
    reply.raise_for_status()
    try:
        content = reply.json()
        score = content["resultMap"]["scores"] if content["success"] else None
        score = score[0] if isinstance(score, list) and len(score) == 1 else score
    except (ValueError, KeyError, TypeError):
        score = None
    if type(score) not in (int, float) or not math.isfinite(score):
        raise ValueError(f"expected a success with a number at resultMap.scores, found {reply.text[:200]!r}")
    return float(score)
