"""Thoughts to learn from, made of a model's own drawings: what it gets wrong, in the generator's words, put right.

Mistakes that are made up are not those that a model makes. Knows prompts of the training part alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from experiments.thoughts_tiny.measure import think
from thinkclearly.data.shape_critic import critique_of, put_right, read_scene
from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import Scene
from thinkclearly.data.thoughts import IMAGE, NOTHING_WRONG, thought_rows
from thinkclearly.decoding.interleaved import context
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.files import replacing
from thinkclearly.generation.draw import to_pictures
from thinkclearly.models.chameleon.processor import TEMPLATES
from thinkclearly.models.finetunes import load_any

SEED, SHAPES = 77, (2, 3, 4)


def write_thoughts(name: str, folder: Path, settings: ThoughtSettings, critiques: int, others: int) -> Path:
    """A file for `source: thoughts`: critiques of the model's own first pictures, and made-up thoughts of all kinds.

    A first picture in which nothing is wrong that words could say, and which the judge still refuses, is left out.

    Args:
        critiques: prompts to draw.
        others: critiques of made-up mistakes, and as many sub-goals and drawings at once.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines, counts = _own_critiques(name, folder, settings, critiques), {}
    counts["critiques"], counts["wrong"] = len(lines), sum(line.pop("wrong") for line in lines)
    for mode in ("critique", "subgoals", "general"):
        shapes = () if mode == "subgoals" else SHAPES
        rows = thought_rows(mode, others, "train", seed=SEED + 1, shapes=shapes, wrong=0.8)
        for number, row in enumerate(rows):
            files = [f"images/{mode}-{number}-{k}.png" for k in range(len(row["images"]))]
            for file, image in zip(files, row["images"]):
                (folder / file).write_bytes(image["bytes"])
            lines.append(_line(mode, row["prompt"], row["response"], files, row))
    path = folder / "thoughts.jsonl"
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "counts.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")
    return path


def _own_critiques(name: str, folder: Path, settings: ThoughtSettings, count: int) -> list[dict]:
    model, processor = load_any(name)
    rows = thought_rows("critique", count, "train", seed=SEED, shapes=SHAPES)
    settings = replace(settings, mode="critique", max_pictures=1)
    found = think(model, processor, [context(processor, row["prompt"], settings) for row in rows], settings)
    lines = []
    for k, (row, thought) in enumerate(zip(rows, found)):
        scene, rng = Scene.from_json(row["scene"]), np.random.default_rng((SEED, k))
        (picture,) = to_pictures(model, torch.tensor(thought.pictures[:1]))
        read, wrong = read_scene(picture), not is_shown(picture, scene)
        text = critique_of(picture, read, scene, rng)
        if wrong == (text in NOTHING_WRONG):
            continue
        files = [f"images/own-{k}-{n}.png" for n in range(2)]
        for file, image in zip(files, (picture, put_right(picture, read, scene))):
            image.save(folder / file)
        response = f"{IMAGE}{text}{IMAGE}"
        own = row | {"edit_of": [-1, 0], "given": 1}
        lines.append(_line("critique", row["prompt"], response, files, own) | {"wrong": wrong})
    return lines


def _line(mode: str, prompt: str, response: str, files: list[str], row: dict) -> dict:
    prompt = TEMPLATES[mode].format(p=prompt)
    rest = {name: row[name] for name in ("edit_of", "given", "scene")}
    return {"prompt": prompt, "response": response, "images": files, **rest}
