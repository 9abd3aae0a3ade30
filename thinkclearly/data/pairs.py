"""Prompts to draw: pairs of captions that differ in one thing, with or without their pictures, and single prompts.

Every reader returns the same columns (`PROMPTS`) with pictures still encoded. Knows nothing of rewards, tokens or
models.
"""

from __future__ import annotations

import hashlib
import io

import datasets
import numpy as np

from thinkclearly.data.shapes import Scene, edit_scene, random_scene
from thinkclearly.data.sources import OFFSETS, PARTS

PROMPTS = datasets.Features(
    {
        "key": datasets.Value("string"),
        "prompts": datasets.List(datasets.Value("string")),
        "images": datasets.List(datasets.Image(decode=False)),
        "scene": datasets.List(datasets.Value("string")),
    }
)
KINDS = ("colour", "place", "shape", "count", "background", "two")
_OPERATIONS = {"colour": "recolour", "place": "move", "shape": "replace", "background": "background"}


# Built in


def shape_pairs(count: int, split: str = "train", seed: int = 0, size: int = 64) -> datasets.Dataset:
    """`count` pairs of captions of the built-in shapes that differ in one thing, with both pictures and scenes.

    Kinds take turns: `KINDS` of the pair's number. "count" is one shape more or less, "two" any two of the others but
    that. All stand on plain backgrounds that the caption names: it then says everything that a picture is judged by,
    and what lies behind a shape is known, without which its outline could not be judged.

    Args:
        split: "train", "calibration" and "test" share no caption, whatever their seeds.
        size: side of the square pictures, pixels.

    Returns:
        `PROMPTS`; a key is `KIND[SEED:NUMBER]`. Pair i of a split and seed is always the same pair.

    Raises:
        ValueError: an unknown split, or a count below 1.
    """
    if split not in PARTS or count < 1:
        raise ValueError(f"shape_pairs: split={split!r}, count={count}; expected {', '.join(PARTS)} and 1 or more.")
    rows = []
    for number in range(OFFSETS[split], OFFSETS[split] + count):
        kind = KINDS[number % len(KINDS)]
        scenes = _pair_of_scenes(kind, split, np.random.default_rng((seed, number)))
        rows.append(
            {
                "key": f"{kind}[{seed}:{number}]",
                "prompts": [scene.caption() for scene in scenes],
                "images": [{"path": None, "bytes": _png(scene, size)} for scene in scenes],
                "scene": [scene.to_json() for scene in scenes],
            }
        )
    return datasets.Dataset.from_list(rows, features=PROMPTS)


def _pair_of_scenes(kind: str, split: str, rng: np.random.Generator) -> tuple[Scene, Scene]:
    while True:
        before = edit_scene(random_scene(rng, []), "background", rng).after
        after = before
        for operation in _operations(kind, len(before.shapes), rng):
            after = edit_scene(after, operation, rng).after
        if _part_of(before.caption()) == _part_of(after.caption()) == split:
            return before, after


def _operations(kind: str, shapes: int, rng: np.random.Generator) -> list[str]:
    if kind == "two":
        return [str(name) for name in rng.choice(list(_OPERATIONS.values()), 2, replace=False)]
    if kind == "count":
        return [{1: "add", 3: "remove"}.get(shapes) or str(rng.choice(["add", "remove"]))]
    return [_OPERATIONS[kind]]


def _part_of(caption: str) -> str:
    """The only part that a caption may be in: half of all captions are for training, a quarter for each other part."""
    return ("train", "train", "calibration", "test")[hashlib.sha256(caption.encode()).digest()[0] % 4]


def _png(scene: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    scene.render(size).save(buffer, "PNG")
    return buffer.getvalue()
