"""What is taught: two colours and a shape that the shipped base never saw, as drawings, edits and questions.

The package's generator and judge are used with the new entries for the length of `new_words()`; the package itself
does not know them. A lesson of a seed is always the same lesson. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from unittest.mock import patch

import numpy as np
from PIL import Image

from thinkclearly.data import shapes
from thinkclearly.data.shapes import OPERATIONS, Scene, ShapeEdit, edit_scene, packaged_photos, random_scene

COLOURS = {"pink": (255, 105, 180), "brown": (120, 75, 35)}
DIAMOND = ((0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0))
NEW = {*COLOURS, "diamond"}
KINDS = ("draw", "edit", "question")
SIDE = 64


@dataclass(frozen=True)
class Lesson:
    """One record: `scene` is what is drawn or asked about, `edit` what is edited."""

    words: str
    scene: Scene | None = None
    edit: ShapeEdit | None = None
    answer: str | None = None

    @property
    def source(self) -> Image.Image | None:
        """The picture that is shown."""
        if self.edit:
            return self.edit.before.render(SIDE)
        return self.scene.render(SIDE) if self.answer else None

    @property
    def target(self) -> Image.Image:
        """The picture to draw."""
        return (self.edit.after if self.edit else self.scene).render(SIDE)

    def is_done(self, result) -> bool:
        """Whether a drawn picture, or an answer in words, is what was asked for. Within `new_words()`."""
        if self.answer:
            return result.strip().rstrip(".").lower() == self.answer
        return self.edit.is_done(result) if self.edit else _shows_all(result, self.scene)


@contextmanager
def new_words() -> Iterator[None]:
    """The generator and its judge also know the new colours and the new shape."""
    outline = shapes._outline
    with (
        patch.dict(shapes.PALETTE, COLOURS),
        patch.object(shapes, "SHAPES", (*shapes.SHAPES, "diamond")),
        patch.object(shapes, "_outline", lambda name: DIAMOND if name == "diamond" else outline(name)),
    ):
        yield


def lessons(kind: str, new: bool, amount: int, seed: int, split: str) -> list[Lesson]:
    """`amount` lessons of a kind, about something new or about nothing new. Within `new_words()`.

    New: a new word is in what is asked or answered. Old: nothing new is asked about, answered or to be seen.
    """
    photos, found = packaged_photos(split), []
    make = {"draw": _drawing, "edit": _editing, "question": _question}[kind]
    for index in count():
        if len(found) == amount:
            return found
        lesson = make(np.random.default_rng((seed, KINDS.index(kind), index)), photos)
        if lesson is not None and new == _asks_something_new(lesson) and (new or not _shows_something_new(lesson)):
            found.append(lesson)


def _drawing(rng: np.random.Generator, photos: list[str]) -> Lesson | None:
    scene = random_scene(rng, [])
    return Lesson(scene.caption(), scene=scene) if scene.background.name else None


def _editing(rng: np.random.Generator, photos: list[str]) -> Lesson:
    edit = edit_scene(random_scene(rng, photos), str(rng.choice(OPERATIONS)), rng)
    return Lesson(edit.instruction, edit=edit)


def _question(rng: np.random.Generator, photos: list[str]) -> Lesson | None:
    scene = random_scene(rng, [])
    name = scene.background.name
    return Lesson("What colour is the background?", scene=scene, answer=name) if name else None


def _asks_something_new(lesson: Lesson) -> bool:
    words = f"{lesson.words} {lesson.answer or ''}".lower().replace(".", " ").replace("?", " ").split()
    return not NEW.isdisjoint(words)


def _shows_something_new(lesson: Lesson) -> bool:
    scenes = [lesson.edit.before, lesson.edit.after] if lesson.edit else [lesson.scene]
    seen = {word for scene in scenes for shape in scene.shapes for word in (shape.name, shape.colour)}
    return not NEW.isdisjoint(seen | {scene.background.name for scene in scenes})


def _shows_all(picture: Image.Image, scene: Scene) -> bool:
    """Every shape in its colour, place and outline, and the background's colour on most of the free area."""
    pixels = np.asarray(picture.convert("RGB"))
    ground = shapes.background_share(pixels, scene) >= 0.75
    return bool(ground and all(shapes.shows(pixels, shape, scene) for shape in scene.shapes))
