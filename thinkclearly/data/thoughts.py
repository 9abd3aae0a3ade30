"""Thoughts: words and pictures in turn, made from the built-in shapes or from any edit data set.

A critique draws, says what is wrong and draws again; sub-goals draw object by object, then all. Number i of a seed is
always the same thought. Knows nothing of tokens or models.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import datasets
import numpy as np

from thinkclearly.data.pairs import part_of
from thinkclearly.data.shapes import (
    PALETTE,
    PLACES,
    SHAPES,
    Background,
    Scene,
    Shape,
    article,
    edit_scene,
    placed,
    random_scene,
)
from thinkclearly.data.sources import OFFSETS, PARTS, read_example

IMAGE = "<image>"  # where a picture stands in a response
THOUGHTS = datasets.Features(
    {
        "key": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "response": datasets.Value("string"),
        "images": datasets.List(datasets.Image(decode=False)),
        "edit_of": datasets.List(datasets.Value("int32")),
        "given": datasets.Value("int32"),
        "scene": datasets.Value("string"),
    }
)
TWO_MISTAKES = 0.15  # share of the wrong pictures
# {what} and {was} are found in the picture, {new} is what the prompt asks for.
WORDINGS = {
    "colour": (
        "The {shape} at the {place} is {was}. It should be {new}.",
        "The {shape} at the {place} should be {new}, not {was}.",
        "There is {a_was} {was} {shape} at the {place}, but the prompt asks for {a_new} {new} one.",
    ),
    "outline": (
        "At the {place} there is a {was}. It should be a {new}.",
        "The {colour} shape at the {place} should be a {new}, not a {was}.",
        "There is {a_colour} {colour} {was} at the {place}, but the prompt asks for a {new}.",
    ),
    "place": (
        "The {colour} {shape} is at the {was}. It should be at the {new}.",
        "The {colour} {shape} should be at the {new}, not at the {was}.",
        "The {colour} {shape} is in the wrong place: it belongs at the {new}.",
    ),
    "missing": (
        "There is no {colour} {shape}. It should be at the {place}.",
        "The {colour} {shape} at the {place} is missing.",
        "Nothing is at the {place}. There should be {a_colour} {colour} {shape}.",
    ),
    "extra": (
        "The {colour} {shape} at the {place} should not be there.",
        "There is {a_colour} {colour} {shape} at the {place}, which the prompt does not ask for.",
        "Nothing should be at the {place}, but there is {a_colour} {colour} {shape}.",
    ),
    "background": (
        "The background is {was}. It should be {new}.",
        "The background should be {new}, not {was}.",
        "The prompt asks for {a_new} {new} background, but it is {was}.",
    ),
}
NOTHING_WRONG = (
    "Everything is right.",
    "The picture shows what the prompt asks for.",
    "Nothing is wrong. The picture stays as it is.",
)
STEPS = {
    "first": ("First {object}.", "I start with {object}.", "One object is {object}."),
    "next": ("Then {object}.", "Next comes {object}.", "Another object is {object}."),
    "last": ("Now everything together.", "Finally the whole picture.", "Now I put them in one picture."),
}


@dataclass(frozen=True)
class Thought:
    """A prompt, and the words and pictures that answer it, in order.

    Attributes:
        edit_of: for each picture the number of the earlier one that it is an edit of, or -1.
        given: how many pictures at the beginning are shown and not taught: a mistake is not to be learnt.
    """

    prompt: str
    parts: tuple[str | Scene, ...]
    edit_of: tuple[int, ...]
    given: int = 0

    @property
    def scenes(self) -> list[Scene]:
        """The pictures; the last one is what the prompt asks for."""
        return [part for part in self.parts if isinstance(part, Scene)]

    @property
    def response(self) -> str:
        """The words, with `IMAGE` where a picture stands."""
        return "".join(IMAGE if isinstance(part, Scene) else part for part in self.parts)


def critique(seed: int, index: int, wrong: float = 0.5, shapes: int | None = None) -> Thought:
    """A picture, what is wrong with it, and the right one, which is the first where nothing is.

    Args:
        wrong: how often the first picture has a mistake: a shape in another colour, outline or place, one missing, one
            too many, or another background; `TWO_MISTAKES` of the wrong ones have two.
        shapes: how many the prompt asks for; one to three if not given.
    """
    rng = np.random.default_rng((seed, index))
    scene = _wanted(rng, index, shapes)
    if rng.random() >= wrong:
        return Thought(scene.caption(), (scene, _pick(rng, NOTHING_WRONG), scene), (-1, 0))
    found, words = _with_mistakes(scene, 2 if rng.random() < TWO_MISTAKES else 1, rng)
    return Thought(scene.caption(), (found, words, scene), (-1, 0), given=1)


def subgoals(seed: int, index: int) -> Thought:
    """Two or three objects, each alone where it will stand, then the whole.

    No picture is an edit of another: each object's lacks what the one before shows, and the words before the whole do
    not say what to change.
    """
    rng = np.random.default_rng((seed, index))
    scene = _wanted(rng, index, shapes=int(rng.integers(2, 4)))
    parts = []
    for number, shape in enumerate(scene.shapes):
        wording = _pick(rng, STEPS["next" if number else "first"])
        parts += [wording.format(object=_object(shape)), replace(scene, shapes=(shape,))]
    count = len(scene.shapes)
    return Thought(scene.caption(), (*parts, _pick(rng, STEPS["last"]), scene), (-1,) * (count + 1))


def direct(seed: int, index: int, shapes: int | None = None) -> Thought:
    """The picture at once, without words."""
    scene = _wanted(np.random.default_rng((seed, index)), index, shapes)
    return Thought(scene.caption(), (scene,), (-1,))


MAKERS: dict[str, Callable[..., Thought]] = {"critique": critique, "subgoals": subgoals, "general": direct}


def thought_rows(
    mode: str,
    count: int,
    split: str = "train",
    seed: int = 0,
    size: int = 64,
    wrong: float = 0.5,
    shapes: Sequence[int] = (),
) -> datasets.Dataset:
    """`count` thoughts of the built-in shapes, with their pictures.

    Args:
        mode: of `MAKERS`; "general" is the picture at once.
        split: "train", "calibration" and "test" share neither numbers nor prompts, whatever their seeds.
        size: side of the square pictures, pixels.
        wrong: of `critique`.
        shapes: how many the prompts of `critique` and `direct` ask for, in turn; one to three if not given.

    Returns:
        `THOUGHTS`; a key is `MODE[SEED:NUMBER]`, `scene` is the last picture's, and the prompt is the caption alone.

    Raises:
        ValueError: an unknown mode or split, or a count below 1.
    """
    if mode not in MAKERS or split not in PARTS or count < 1:
        known = f"{', '.join(MAKERS)}; {', '.join(PARTS)}; 1 or more"
        raise ValueError(f"thought_rows: mode={mode!r}, split={split!r}, count={count}; expected {known}.")
    options = {"wrong": wrong} if mode == "critique" else {}
    numbers = range(OFFSETS[split], OFFSETS[split] + count)
    rows = []
    for number in numbers:
        if shapes:
            options["shapes"] = shapes[number % len(shapes)]
        rows.append(_row(f"{mode}[{seed}:{number}]", MAKERS[mode](seed, number, **options), size))
    return datasets.Dataset.from_list(rows, features=THOUGHTS)


def from_edits(rows: datasets.Dataset) -> datasets.Dataset:
    """Photo pairs (`data.sources.FEATURES`) as critiques: the source, the instruction, the target.

    The prompt is what the target shows, where the rows have a column `caption`; else it is the instruction, which
    tells a model little of what to draw first.

    Returns:
        `THOUGHTS`, in the rows' order; the target is an edit of the source.

    Raises:
        BadRecord: pictures or words of a row cannot be read.
    """

    def convert(row: Mapping) -> dict:
        words = read_example(row).instruction
        return {
            "key": row["key"],
            "prompt": row.get("caption") or words,
            "response": f"{IMAGE}{words}{IMAGE}",
            "images": [row["source"], row["target"]],
            "edit_of": [-1, 0],
            "given": 1,
            "scene": "",
        }

    return rows.map(convert, remove_columns=rows.column_names, features=THOUGHTS, desc="critiques")


def from_captions(rows: datasets.Dataset) -> datasets.Dataset:
    """Captioned pictures (`data.samples.SAMPLES`) as thoughts without words: the caption is the prompt."""

    def convert(row: Mapping) -> dict:
        values = {"key": row["key"], "prompt": row["instruction"], "response": IMAGE, "images": [row["target"]]}
        return values | {"edit_of": [-1], "given": 0, "scene": ""}

    return rows.map(convert, remove_columns=rows.column_names, features=THOUGHTS, desc="captions")


def _row(key: str, thought: Thought, size: int) -> dict:
    images = []
    for scene in thought.scenes:
        buffer = io.BytesIO()
        scene.render(size).save(buffer, "PNG")
        images.append({"path": None, "bytes": buffer.getvalue()})
    return {
        "key": key,
        "prompt": thought.prompt,
        "response": thought.response,
        "images": images,
        "edit_of": list(thought.edit_of),
        "given": thought.given,
        "scene": thought.scenes[-1].to_json(),
    }


def _wanted(rng: np.random.Generator, index: int, shapes: int | None = None) -> Scene:
    """A scene over a plain background that its caption names; the caption is of the part that `index` belongs to."""
    part = next(part for part in sorted(PARTS, key=OFFSETS.get, reverse=True) if index >= OFFSETS[part])
    while True:
        scene = edit_scene(random_scene(rng, [], shapes), "background", rng).after
        if part_of(scene.caption()) == part:
            return scene


def _with_mistakes(scene: Scene, count: int, rng: np.random.Generator) -> tuple[Scene, str]:
    """The scene with `count` mistakes of different kinds in different shapes, and what is wrong in words."""
    kinds = ["colour", "outline", "place", "extra", "background"]
    if len(scene.shapes) > 1:  # an empty picture would be the same in every part of the data
        kinds.append("missing")
    found, words, right = scene, [], list(scene.shapes)
    for kind in rng.permutation(kinds):
        if len(words) == count:
            break
        if kind in ("extra", "background") or right:
            subject = None if kind in ("extra", "background") else right.pop(int(rng.integers(len(right))))
            found, said = _MISTAKES[kind](scene, found, subject, rng)
            words.append(_pick(rng, WORDINGS[kind]).format(**said))
    return found, " ".join(words)


# Each takes the wanted scene, the scene so far and the shape to get wrong; it returns the next scene and its words.
# What is new is in neither scene, so that the words mean one thing.


def _wrong_colour(wanted: Scene, found: Scene, shape: Shape, rng: np.random.Generator) -> tuple[Scene, dict]:
    colour = _pick(rng, [c for s, c in _free_kinds(wanted, found) if s == shape.name])
    said = {"shape": shape.name, "place": shape.place, "was": colour, "new": shape.colour}
    said |= {"a_was": article(colour), "a_new": article(shape.colour)}
    return _swap(found, shape, replace(shape, colour=colour)), said


def _wrong_outline(wanted: Scene, found: Scene, shape: Shape, rng: np.random.Generator) -> tuple[Scene, dict]:
    name = _pick(rng, [s for s, c in _free_kinds(wanted, found) if c == shape.colour])
    said = {"colour": shape.colour, "a_colour": article(shape.colour), "place": shape.place, "was": name}
    return _swap(found, shape, replace(shape, name=name)), said | {"new": shape.name}


def _wrong_place(wanted: Scene, found: Scene, shape: Shape, rng: np.random.Generator) -> tuple[Scene, dict]:
    moved = placed((shape.name, shape.colour), _free_place(wanted, found, rng), rng)
    said = {"colour": shape.colour, "shape": shape.name, "was": moved.place, "new": shape.place}
    return _swap(found, shape, replace(moved, radius=shape.radius)), said


def _missing(wanted: Scene, found: Scene, shape: Shape, rng: np.random.Generator) -> tuple[Scene, dict]:
    return replace(found, shapes=tuple(s for s in found.shapes if s != shape)), _named(shape)


def _extra(wanted: Scene, found: Scene, shape: None, rng: np.random.Generator) -> tuple[Scene, dict]:
    new = placed(_pick(rng, _free_kinds(wanted, found)), _free_place(wanted, found, rng), rng)
    return replace(found, shapes=(*found.shapes, new)), _named(new)


def _wrong_background(wanted: Scene, found: Scene, shape: None, rng: np.random.Generator) -> tuple[Scene, dict]:
    used = {wanted.background.name, *(s.colour for scene in (wanted, found) for s in scene.shapes)}
    name, right = _pick(rng, [colour for colour in PALETTE if colour not in used]), wanted.background.name
    said = {"was": name, "new": right, "a_new": article(right)}
    return replace(found, background=Background((PALETTE[name],), name=name)), said


_MISTAKES = {
    "colour": _wrong_colour,
    "outline": _wrong_outline,
    "place": _wrong_place,
    "missing": _missing,
    "extra": _extra,
    "background": _wrong_background,
}


def _free_kinds(*scenes: Scene) -> list[tuple[str, str]]:
    """Names and colours of shapes that stand out from the backgrounds and are in none of the scenes."""
    grounds = {scene.background.name for scene in scenes}
    taken = {(shape.name, shape.colour) for scene in scenes for shape in scene.shapes}
    return [(s, c) for s in SHAPES for c in PALETTE if c not in grounds and (s, c) not in taken]


def _free_place(wanted: Scene, found: Scene, rng: np.random.Generator) -> int:
    taken = {shape.place for scene in (wanted, found) for shape in scene.shapes}
    return _pick(rng, [number for number, place in enumerate(PLACES) if place not in taken])


def _swap(scene: Scene, old: Shape, new: Shape) -> Scene:
    return replace(scene, shapes=tuple(new if shape == old else shape for shape in scene.shapes))


def _named(shape: Shape) -> dict:
    return {"colour": shape.colour, "a_colour": article(shape.colour), "shape": shape.name, "place": shape.place}


def _object(shape: Shape) -> str:
    return f"{article(shape.colour)} {shape.colour} {shape.name} at the {shape.place}"


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]
