"""What thoughts about held-out prompts come to, judged by the generator of the shapes.

Knows prompts, thoughts and the judge. Does not know how a model was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from thinkclearly.data.shape_critic import critique_of, read_scene
from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import Scene, nearest_colour
from thinkclearly.data.thoughts import IMAGE, thought_rows
from thinkclearly.decoding.interleaved import Context, Drew, Said, context, interleave
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.generation.draw import to_pictures
from thinkclearly.images import load_image
from thinkclearly.models.chameleon.processor import ChameleonProcessor
from thinkclearly.models.instruction_head import InstructionModel

SEED = 900  # of the prompts and of all noise
BATCH = 50  # thoughts at once
SHAPES = (3, 4)  # of a prompt: with fewer the model draws too well to have much left to mend
RIGHT = 0.9  # share of a patch's pixels that have the wanted colour, from which on the patch is right


@dataclass
class Found:
    """One thought.

    Attributes:
        said: ids of the words between the pictures, in order.
        pictures: codes of the pictures.
        copied: how many codes of the last picture were copied by CLEAR.
        passes: of each picture.
    """

    said: list[list[int]] = field(default_factory=list)
    pictures: list[list[int]] = field(default_factory=list)
    copied: int = 0
    passes: list[int] = field(default_factory=list)


def held_out(mode: str, count: int) -> list[tuple[str, Scene]]:
    """Prompts and true scenes that no training saw; of `SHAPES`, or of two and three for sub-goals."""
    rows = thought_rows(mode, count, "test", seed=SEED, shapes=() if mode == "subgoals" else SHAPES)
    return [(row["prompt"], Scene.from_json(row["scene"])) for row in rows]


def think(
    model: InstructionModel,
    processor: ChameleonProcessor,
    starts: Sequence[Context],
    settings: ThoughtSettings,
    seed: int = SEED,
) -> list[Found]:
    """The thoughts that begin like `starts`; number i of a call always has the same noise."""
    found = [Found() for _ in starts]
    for first in range(0, len(starts), BATCH):
        batch = starts[first : first + BATCH]
        samples = [(seed, first + k) for k in range(len(batch))]
        for k, part in interleave(model, processor, batch, settings, samples):
            one = found[first + k]
            if isinstance(part, Said):
                one.said.append(part.ids)
            elif isinstance(part, Drew):
                one.pictures.append(part.codes)
                one.passes.append(part.passes)
                one.copied = sum(part.copied or ())
    return found


def draw_pictures(model: InstructionModel, pictures: Sequence[Sequence[int]]) -> list[Image.Image]:
    """Codes as pictures."""
    return [
        p for i in range(0, len(pictures), BATCH) for p in to_pictures(model, torch.tensor(pictures[i : i + BATCH]))
    ]


def shown(model: InstructionModel, pictures: Sequence[Sequence[int] | None], scenes: Sequence[Scene]) -> list[bool]:
    """Which pictures show their scene, strictly; one that was never drawn does not."""
    there = [i for i, codes in enumerate(pictures) if codes is not None]
    drawn = dict(zip(there, draw_pictures(model, [pictures[i] for i in there])))
    return [i in drawn and is_shown(drawn[i], scene) for i, scene in enumerate(scenes)]


def share(values: Sequence[bool]) -> float:
    return float(np.mean(values))


def drawing_at_once(model, processor, prompts, settings: ThoughtSettings) -> list[bool]:
    """One picture, no thought. The trained form: the bare prompt, and the picture begins at once."""
    settings = replace(settings, mode="general", max_pictures=1)
    starts = [context(processor, prompt, settings) for prompt, _ in prompts]
    starts = [Context([*start.ids, processor.boi_id], start.prompt_ids) for start in starts]
    found = think(model, processor, starts, settings)
    return shown(model, [one.pictures[0] for one in found], [scene for _, scene in prompts])


def critiques(model, processor, prompts, settings: ThoughtSettings) -> tuple[list[Found], dict]:
    """The first picture and the last."""
    starts = [context(processor, prompt, settings) for prompt, _ in prompts]
    found, scenes = think(model, processor, starts, settings), [scene for _, scene in prompts]
    first = shown(model, [one.pictures[0] for one in found], scenes)
    last = shown(model, [one.pictures[-1] for one in found], scenes)
    return found, {
        "first": share(first),
        "last": share(last),
        "right stays right": share([b for a, b in zip(first, last) if a]),
        "wrong becomes right": share([b for a, b in zip(first, last) if not a]),
        "second pictures": share([len(one.pictures) > 1 for one in found]),
    }


def subgoals(model, processor, prompts, settings: ThoughtSettings) -> dict:
    """Object by object: the last picture."""
    settings = replace(settings, mode="subgoals")
    starts = [context(processor, prompt, settings) for prompt, _ in prompts]
    found = think(model, processor, starts, settings)
    last = [one.pictures[-1] if one.pictures else None for one in found]
    wanted = [len(scene.shapes) + 1 for _, scene in prompts]
    return {
        "last": share(shown(model, last, [scene for _, scene in prompts])),
        "all pictures": share([len(one.pictures) == n for one, n in zip(found, wanted)]),
    }


def interventions(model, processor, prompts, settings: ThoughtSettings, found: list[Found]) -> dict[str, float]:
    """Share of last pictures that are right where the first picture, or the words, are not the thought's own.

    Others' are the next thought's; the judge's words are those of the generator, which knows what is wrong.
    """
    scenes, others = [scene for _, scene in prompts], found[1:] + found[:1]
    own = [one.said[0] if one.said else [] for one in found]
    strange = [one.said[0] if one.said else [] for one in others]
    drawn = draw_pictures(model, [one.pictures[0] for one in found])
    told = [critique_of(p, read_scene(p), s, np.random.default_rng(k)) for k, (p, s) in enumerate(zip(drawn, scenes))]
    judged = [processor.encode_words(text, bos=False) for text in told]
    settings = replace(settings, max_pictures=1)
    starts = [context(processor, prompt, settings) for prompt, _ in prompts]
    result = {}
    for name, pictures, words in (
        ("own picture, own words", found, own),
        ("another's picture, own words", others, own),
        ("own picture, another's words", found, strange),
        ("another's picture and words", others, strange),
        ("own picture, the judge's words", found, judged),
    ):
        contexts = []
        for start, one, ids in zip(starts, pictures, words):
            picture = processor.picture_ids(one.pictures[0])[1:]
            contexts.append(Context([*start.ids, *picture, *ids, processor.boi_id], start.prompt_ids))
        # With the noise that drew the first picture its mistakes would come again.
        again = think(model, processor, contexts, settings, seed=SEED + 1)
        result[name] = share(shown(model, [one.pictures[0] for one in again], scenes))
    return result


def right_patches(picture: Image.Image, scene: Scene, grid: int) -> np.ndarray:
    """Which patches, bool (grid²,), already have the wanted colours."""
    wanted = nearest_colour(np.asarray(scene.render(*picture.size)), 1e9)
    same = nearest_colour(np.asarray(picture.convert("RGB")), 1e9) == wanted
    side = picture.size[0] // grid
    return same.reshape(grid, side, grid, side).mean((1, 3)).ravel() >= RIGHT


def second_thoughts(model, processor, prompts, settings: ThoughtSettings) -> dict:
    """Second pictures by critique: done, passes, and what was right in the first picture and is still the same."""
    found, result = critiques(model, processor, prompts, settings)
    return result | kept(model, processor, found, prompts)


def mended(model, processor, count: int, settings: ThoughtSettings) -> dict:
    """The same for first pictures with made-up mistakes of the generator, and its words."""
    rows = thought_rows("critique", count, "test", seed=SEED + 2, wrong=1.0)
    prompts = [(row["prompt"], Scene.from_json(row["scene"])) for row in rows]
    squares = [load_image(row["images"][0]["bytes"]) for row in rows]
    codes = [model.token_model.encode(processor.pixel_values([square]))[0].tolist() for square in squares]
    contexts = []
    for row, first in zip(rows, codes):
        start = context(processor, row["prompt"], settings)
        words = row["response"].removeprefix(IMAGE).removesuffix(IMAGE)
        ids = [*processor.picture_ids(first)[1:], *processor.encode_words(words, bos=False), processor.boi_id]
        contexts.append(Context([*start.ids, *ids], start.prompt_ids, [first]))
    found = think(model, processor, contexts, replace(settings, max_pictures=2))
    for one, first in zip(found, codes):
        one.pictures.insert(0, first)
    scenes = [scene for _, scene in prompts]
    right = {
        name: shown(model, [one.pictures[k] for one in found], scenes) for name, k in (("first", 0), ("last", -1))
    }
    return {name: share(values) for name, values in right.items()} | kept(model, processor, found, prompts)


def kept(model, processor, found: list[Found], prompts) -> dict[str, float]:
    """Of second pictures: passes, and shares of what was right in the first pictures and has the same codes."""
    pairs = [(one, scene) for one, (_, scene) in zip(found, prompts) if len(one.pictures) > 1]
    same_patches = total = whole = right_pictures = 0
    for (one, scene), picture in zip(pairs, draw_pictures(model, [one.pictures[0] for one, _ in pairs])):
        right = right_patches(picture, scene, processor.grid)
        same = np.array(one.pictures[0]) == np.array(one.pictures[-1])
        same_patches, total = same_patches + (same & right).sum(), total + right.sum()
        if is_shown(picture, scene):
            right_pictures, whole = right_pictures + 1, whole + bool(same.all())
    return {
        "passes": float(np.mean([one.passes[-1] for one, _ in pairs])),
        "right patches kept": float(same_patches / total),
        "right pictures kept whole": float(whole / max(1, right_pictures)),
        "copied by CLEAR": float(np.mean([one.copied / processor.num_image_tokens for one, _ in pairs])),
    }
