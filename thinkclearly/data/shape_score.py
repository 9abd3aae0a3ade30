"""How much of a scene of the built-in shapes a picture shows, and whether it shows all of it.

Knows nothing of prompts, rewards or models.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from thinkclearly.data.shapes import (
    PALETTE,
    PLACES,
    SHAPES,
    Scene,
    Shape,
    background_share,
    free_area,
    nearest_colour,
    shows,
)

# Nearer than the judge's own 110: mid-grey is 86 from purple, and shall have no colour.
TOLERANCE = 80.0


def scene_score(picture: Image.Image, scene: Scene) -> float:
    """In [0, 1]; 1 for the scene's own rendering, at any size.

    Four quarters, three of them means over the shapes:

    - colour: how much of it there is anywhere, against how much there should be: the smaller over the larger area;
    - place: the share of the shape's area where something other than the background is, whatever its colour, less
      the share of the free area where there is more of it than there should be;
    - outline: place, times how much better the right outline fits than the best other: 1 from half the lead that it
      has in the scene's own rendering, 1/2 if both fit alike, 0 if another fits so much better;
    - background: the share of the free area that has its colour.

    A shape too many counts as one of which nothing is right. The background of a drawn picture is the colour that most
    of the free area has. Where the scene's background has no name, as over a photograph, the last quarter is left out,
    and what has the shape's colour is taken for the shape.
    """
    drawn, wanted = _colours(picture), _colours(scene.render(*picture.size))
    free = free_area(scene, *picture.size)
    if not scene.background.name:
        figures = [(drawn == colour, wanted == colour) for colour in map(_number, scene.shapes)]
        shown = [_shown(shape, drawn, wanted, *pair, free) for shape, pair in zip(scene.shapes, figures)]
        return float(np.mean(shown)) if shown else 1.0
    ground = _ground(drawn, scene)
    name = list(PALETTE).index(scene.background.name)
    shown = [_shown(shape, drawn, wanted, drawn != ground, wanted != name, free) for shape in scene.shapes]
    extra = max(0, _occupied(drawn != ground) - len(shown))
    quality = sum(shown) / (len(shown) + extra) if shown else 1 / (1 + extra)
    return float(0.75 * quality + 0.25 * (drawn[free] == name).mean())


def is_shown(picture: Image.Image, scene: Scene) -> bool:
    """Whether every shape is there in colour, place and outline, as `ShapeEdit.is_done` judges them.

    Where the background has a name, three quarters of the free area must have its colour, and there must be no other
    shape.
    """
    pixels = np.asarray(picture.convert("RGB"))
    if scene.background.name:
        drawn = _colours(picture)
        if background_share(pixels, scene) < 0.75 or _occupied(drawn != _ground(drawn, scene)) > len(scene.shapes):
            return False
    return all(shows(pixels, shape, scene) for shape in scene.shapes)


def _shown(shape: Shape, drawn, wanted, drawn_figure, wanted_figure, free) -> float:
    """Mean of a shape's colour, place and outline. Colours by number and figures, bool, as drawn and as wanted."""
    areas = sorted((colours == _number(shape)).sum() for colours in (drawn, wanted))
    place = _place(drawn_figure, wanted_figure, shape, free)
    return (areas[0] / max(1, areas[1]) + place + place * _outline(drawn_figure, wanted_figure, shape)) / 3


def _colours(picture: Image.Image) -> np.ndarray:
    return nearest_colour(np.asarray(picture.convert("RGB")), TOLERANCE)


def _ground(colours: np.ndarray, scene: Scene) -> int:
    """The colour, by number, of most of the area where the scene has no shapes."""
    return np.bincount(colours[free_area(scene, *colours.shape[::-1])] + 1).argmax() - 1


def _number(shape: Shape) -> int:
    return list(PALETTE).index(shape.colour)


def _place(drawn: np.ndarray, wanted: np.ndarray, shape: Shape, free: np.ndarray) -> float:
    figure, coverage = _around(drawn, shape)
    return figure[coverage > 0.9].mean() * (1 - max(0.0, drawn[free].mean() - wanted[free].mean()))


def _outline(drawn: np.ndarray, wanted: np.ndarray, shape: Shape) -> float:
    found, right = _margin(drawn, shape), _margin(wanted, shape)
    return 1.0 if right < 0.02 else float(np.clip(0.5 + found / right, 0, 1))  # below: too small to tell


def _margin(figure: np.ndarray, shape: Shape) -> float:
    """Intersection over union with the shape's outline, less that with the best other."""
    fits = {}
    for name in SHAPES:
        found, coverage = _around(figure, replace(shape, name=name))
        fits[name] = (found & (coverage > 0.5)).sum() / max(1, (found | (coverage > 0.5)).sum())
    return fits.pop(shape.name) - max(fits.values())


def _around(figure: np.ndarray, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """The figure in the shape's box, and the shape's coverage there."""
    height, width = figure.shape
    left, top, right, bottom = shape.box(width, height)
    return figure[top:bottom, left:right], shape.coverage(width, height)


def _occupied(figure: np.ndarray) -> int:
    """At how many of the nine places there is something."""
    centres = [divmod(place, 3) for place in range(len(PLACES))]
    discs = [Shape("circle", "", "", (column + 0.5) / 3, (row + 0.5) / 3, 0.1) for row, column in centres]
    return sum(bool(found[coverage > 0.5].mean() > 0.5) for found, coverage in (_around(figure, d) for d in discs))
