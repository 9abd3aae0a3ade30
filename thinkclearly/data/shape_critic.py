"""What a picture of shapes on a plain background shows, what is wrong with it in words, and the picture put right.

A critique of any picture, a model's own drawings among them, whereas `data.thoughts` makes both picture and mistake.
Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from thinkclearly.data.shape_score import TOLERANCE
from thinkclearly.data.shapes import PALETTE, PLACES, SHAPES, Background, Scene, Shape, article, nearest_colour, shows
from thinkclearly.data.thoughts import NOTHING_WRONG, WORDINGS

RADIUS = 0.145  # of the generator's shapes, on average
BADLY_DRAWN = (
    "The {colour} {shape} at the {place} is not well drawn.",
    "The {shape} at the {place} does not look like a {shape}.",
)


def read_scene(picture: Image.Image) -> Scene:
    """The shapes of a picture at the generator's nine places, each by its commonest colour and best fitting outline.

    The background is the commonest colour; a place is taken where less than half of its middle has that colour.
    """
    colours = nearest_colour(np.asarray(picture.convert("RGB")), TOLERANCE)
    ground = int(np.bincount(colours[colours >= 0], minlength=len(PALETTE)).argmax())
    name = list(PALETTE)[ground]
    shapes = [_read_shape(colours, ground, place) for place in range(len(PLACES))]
    return Scene(Background((PALETTE[name],), name=name), tuple(shape for shape in shapes if shape))


def _read_shape(colours: np.ndarray, ground: int, place: int) -> Shape | None:
    row, column = divmod(place, 3)
    at = Shape("circle", "", PLACES[place], (column + 0.5) / 3, (row + 0.5) / 3, RADIUS)
    here, middle = _around(colours, replace(at, radius=0.1))
    if (here[middle > 0.5] != ground).mean() < 0.5:
        return None
    found, _ = _around(colours, at)
    others = found[(found != ground) & (found >= 0)]
    if not len(others):
        return None
    colour = int(np.bincount(others).argmax())
    fits = {}
    for name in SHAPES:
        found, coverage = _around(colours, replace(at, name=name))
        figure, outline = found == colour, coverage > 0.5
        fits[name] = (figure & outline).sum() / (figure | outline).sum()
    return replace(at, name=max(fits, key=fits.get), colour=list(PALETTE)[colour])


def _around(colours: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    height, width = colours.shape
    left, top, right, bottom = shape.box(width, height)
    return colours[top:bottom, left:right], shape.coverage(width, height)


def mistakes(found: Scene, wanted: Scene, rng: np.random.Generator) -> list[str]:
    """What is wrong with a scene, a sentence each, in the words of `data.thoughts`; empty where nothing is.

    A shape that differs from the wanted one at its place in colour and outline is one too many, and the wanted one is
    missing.
    """
    said, too_many = [], [s for s in found.shapes if not _like(s, wanted.shapes)]
    for shape in [s for s in wanted.shapes if not _like(s, found.shapes)]:
        a = {"a_colour": article(shape.colour), "a_new": article(shape.colour)}
        for other in too_many:
            same = [getattr(shape, key) == getattr(other, key) for key in ("name", "colour", "place")]
            if sum(same) == 2:
                kind = ("outline", "colour", "place")[same.index(False)]
                was, new = (getattr(s, ("name", "colour", "place")[same.index(False)]) for s in (other, shape))
                words = {"shape": shape.name, "colour": shape.colour, "place": shape.place, **a}
                said.append((kind, words | {"was": was, "new": new, "a_was": article(was)}))
                too_many.remove(other)
                break
        else:
            said.append(("missing", {"shape": shape.name, "colour": shape.colour, "place": shape.place, **a}))
    for other in too_many:
        words = {"shape": other.name, "colour": other.colour, "place": other.place, "a_colour": article(other.colour)}
        said.append(("extra", words))
    if found.background.name != wanted.background.name:
        new = wanted.background.name
        said.append(("background", {"was": found.background.name, "new": new, "a_new": article(new)}))
    return [_pick(rng, WORDINGS[kind]).format(**words) for kind, words in said]


def badly_drawn(picture: Image.Image, found: Scene, wanted: Scene) -> list[Shape]:
    """Wanted shapes that are there in name, colour and place, and that the judge still does not take for drawn."""
    pixels = np.asarray(picture.convert("RGB"))
    return [shape for shape in wanted.shapes if _like(shape, found.shapes) and not shows(pixels, shape, wanted)]


def critique_of(picture: Image.Image, found: Scene, wanted: Scene, rng: np.random.Generator) -> str:
    """What is wrong, the mistakes first, then what is badly drawn; or that nothing is."""
    said = mistakes(found, wanted, rng)
    for shape in badly_drawn(picture, found, wanted):
        said.append(_pick(rng, BADLY_DRAWN).format(shape=shape.name, colour=shape.colour, place=shape.place))
    return " ".join(said) or _pick(rng, NOTHING_WRONG)


def put_right(picture: Image.Image, found: Scene, wanted: Scene) -> Image.Image:
    """The picture with its mistakes mended and everything else left as it is; drawn anew on another background."""
    if found.background.name != wanted.background.name:
        return wanted.render(*picture.size)
    result = picture.convert("RGB")
    right = wanted.render(*picture.size)
    wrong = [s for s in found.shapes if not _like(s, wanted.shapes)]
    wrong += [s for s in wanted.shapes if not _like(s, found.shapes)] + badly_drawn(picture, found, wanted)
    for place in {PLACES.index(shape.place) for shape in wrong}:
        row, column = divmod(place, 3)
        box = [round(n * side / 3) for n, side in zip((column, row, column + 1, row + 1), picture.size * 2)]
        result.paste(right.crop(box), box[:2])
    return result


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _like(shape: Shape, others: tuple[Shape, ...]) -> bool:
    """Whether there is a shape of the same name, colour and place; where exactly it stands does not count."""
    return (shape.name, shape.colour, shape.place) in {(s.name, s.colour, s.place) for s in others}
