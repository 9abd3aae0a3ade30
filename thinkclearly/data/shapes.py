"""The built-in edit generator: coloured shapes over photographs and gradients, with instruction and true edit mask.

Draws, words and judges edits at any picture size; example i of a seed is always the same example.
Knows nothing of tokens, models or files beyond the photographs it draws on.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from thinkclearly.data.photographs import PACKAGED_PHOTOS, open_photo, packaged_photo

PALETTE = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 60, 180),
    "orange": (250, 130, 20),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
PLACES = tuple(f"{row} {column}".strip() or "center" for row in ROWS for column in COLUMNS)
OPERATIONS = ("recolour", "remove", "add", "move", "replace", "background")

WORDINGS = {
    "recolour": (
        "make the {old} {shape} {new}",
        "turn the {old} {shape} {new}",
        "paint the {old} {shape} {new}",
        "change the {old} {shape} to {new}",
        "change the colour of the {old} {shape} to {new}",
    ),
    "remove": (
        "remove the {old} {shape}",
        "delete the {old} {shape}",
        "erase the {old} {shape}",
        "take away the {old} {shape}",
    ),
    "add": (
        "add {a} {new} {shape} at the {place}",
        "put {a} {new} {shape} at the {place}",
        "draw {a} {new} {shape} at the {place}",
    ),
    "move": (
        "move the {old} {shape} to the {place}",
        "shift the {old} {shape} to the {place}",
        "bring the {old} {shape} to the {place}",
    ),
    "replace": (
        "replace the {old} {shape} with a {other}",
        "turn the {old} {shape} into a {other}",
        "swap the {old} {shape} for a {other}",
    ),
    "background": (
        "change the background to {new}",
        "make the background {new}",
        "paint the background {new}",
        "use {a} {new} background",
    ),
}


@dataclass(frozen=True)
class Shape:
    """One coloured shape; its centre in shares of width and height, its radius in shares of the short side."""

    name: str
    colour: str
    place: str
    x: float
    y: float
    radius: float

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom), pixels, clipped to the picture."""
        r = self.radius * min(width, height) + 1
        cx, cy = self.x * width, self.y * height
        left, top = max(0, math.floor(cx - r)), max(0, math.floor(cy - r))
        return left, top, min(width, math.ceil(cx + r)), min(height, math.ceil(cy + r))

    def coverage(self, width: int, height: int) -> np.ndarray:
        """Share of each pixel of `box` that the shape covers: float32 (box height, box width) in [0, 1]."""
        left, top, right, bottom = self.box(width, height)
        over = 4 if right - left < 512 else 2
        canvas = Image.new("L", ((right - left) * over, (bottom - top) * over))
        r = self.radius * min(width, height) * over
        cx, cy = (self.x * width - left) * over, (self.y * height - top) * over
        draw = ImageDraw.Draw(canvas)
        if self.name == "circle":
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        else:
            draw.polygon([(cx + r * px, cy + r * py) for px, py in _outline(self.name)], fill=255)
        return np.asarray(canvas.reduce(over), dtype=np.float32) / 255


@cache
def _outline(name: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape of circumradius 1 around the origin, y down."""
    if name == "square":
        return ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86))
    if name == "triangle":
        return ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85))
    radii = [1.0, 0.42] * 5
    return tuple((r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii))


@dataclass(frozen=True)
class Background:
    """A plain colour, a linear gradient between two colours, or a crop of a photograph (its path and relative box)."""

    colours: tuple[tuple[int, int, int], ...] = ()
    angle: float = 0.0
    photo: str = ""
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    name: str = ""

    def render(self, width: int, height: int) -> np.ndarray:
        if self.photo:
            photo = open_photo(self.photo)
            box = tuple(c * s for c, s in zip(self.crop, photo.size * 2))
            return np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
        if len(self.colours) == 1:
            return np.broadcast_to(np.uint8(self.colours[0]), (height, width, 3))
        ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
        t = np.cos(self.angle) * (xs / width - 0.5) + np.sin(self.angle) * (ys / height - 0.5)
        t = np.clip(t / 1.2 + 0.5, 0, 1)[..., None]
        start, end = np.float32(self.colours[0]), np.float32(self.colours[1])
        return (start + t * (end - start) + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Scene:
    """A background and the shapes on it."""

    background: Background
    shapes: tuple[Shape, ...]

    def render(self, width: int, height: int | None = None) -> Image.Image:
        height = height or width
        canvas = self.background.render(width, height).copy()
        for shape in self.shapes:
            left, top, right, bottom = shape.box(width, height)
            alpha = shape.coverage(width, height)[..., None]
            patch = canvas[top:bottom, left:right]
            blend = patch + alpha * (np.float32(PALETTE[shape.colour]) - patch)
            canvas[top:bottom, left:right] = (blend + 0.5).astype(np.uint8)
        return Image.fromarray(canvas)

    def caption(self) -> str:
        """Words for text-to-image: shapes with places, and the background where it has a name."""
        parts = [f"{article(s.colour)} {s.colour} {s.name} at the {s.place}" for s in self.shapes]
        text, ground = " and ".join(parts) or "nothing", self.background.name
        return f"{text} on {article(ground)} {ground} background" if ground else text

    def to_json(self) -> str:
        """For `from_json`; a packaged photograph goes by package and name, so that any installation finds it."""
        content, photo = asdict(self), Path(self.background.photo).as_posix()
        packaged = [pair for pair in chain(*PACKAGED_PHOTOS.values()) if photo.endswith("/" + "/".join(pair))]
        content["background"]["photo"] = packaged[0] if packaged else self.background.photo
        return json.dumps(content)

    @staticmethod
    def from_json(text: str) -> Scene:
        """The scene that `to_json` wrote: its pictures are the same to the byte."""
        content = json.loads(text)
        ground = content["background"]
        ground["colours"], ground["crop"] = tuple(map(tuple, ground["colours"])), tuple(ground["crop"])
        if not isinstance(ground["photo"], str):
            ground["photo"] = packaged_photo(*ground["photo"])
        return Scene(Background(**ground), tuple(Shape(**shape) for shape in content["shapes"]))


@dataclass(frozen=True)
class ShapeEdit:
    """One edit: the scenes before and after, what was asked, and how to tell whether a picture did it."""

    operation: str
    instruction: str
    before: Scene
    after: Scene

    def render(self, width: int, height: int | None = None) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Source, target and the true edit mask (mode "L", 255 where a pixel differs)."""
        source, target = self.before.render(width, height), self.after.render(width, height)
        changed = (np.asarray(source) != np.asarray(target)).any(-1)
        return source, target, Image.fromarray(np.uint8(changed) * 255)

    def is_done(self, picture: Image.Image) -> bool:
        """Whether `picture` shows what was asked, judged by colour, place and shape.

        Where something was to change, the picture must be nearer to the target than to the source. New shapes must be
        there, in colour and outline; gone shapes must no longer be there; a new background must have its colour on
        most of the free area. What was not asked about is not looked at.
        """
        pixels = np.asarray(picture.convert("RGB"))
        source, target, changed = (np.asarray(p, np.float32) for p in self.render(*picture.size))
        if _share_nearer(pixels, target, source, changed > 0) < 0.5:
            return False
        if self.operation == "background":
            return bool(background_share(pixels, self.after) >= 0.75)
        gone = [s for s in self.before.shapes if s not in self.after.shapes]
        new = [s for s in self.after.shapes if s not in self.before.shapes]
        replaced = {s.place for s in new}
        return all(shows(pixels, s, self.after) for s in new) and not any(
            _still_there(pixels, s, source, target) for s in gone if s.place not in replaced
        )

    def to_json(self) -> str:
        """For `from_json`."""
        scenes = {name: getattr(self, name).to_json() for name in ("before", "after")}
        return json.dumps({"operation": self.operation, "instruction": self.instruction, **scenes})

    @staticmethod
    def from_json(text: str) -> ShapeEdit:
        """The edit that `to_json` wrote."""
        content = json.loads(text)
        scenes = {name: Scene.from_json(content[name]) for name in ("before", "after")}
        return ShapeEdit(content["operation"], content["instruction"], **scenes)


def nearest_colour(pixels: np.ndarray, tolerance: float) -> np.ndarray:
    """Number in `PALETTE` of the nearest colour, -1 if none is less than `tolerance` (Euclidean, 0-255) away.

    uint8 (..., 3) -> int (...).
    """
    table = np.float32(list(PALETTE.values()))
    distance = np.linalg.norm(pixels[..., None, :].astype(np.float32) - table, axis=-1)
    return np.where(distance.min(-1) < tolerance, distance.argmin(-1), -1)


def has_colour(pixels: np.ndarray, colour: str, tolerance: float = 110.0) -> np.ndarray:
    """Where `colour` is the palette's nearest and less than `tolerance` away; (..., 3) -> (...)."""
    return nearest_colour(pixels, tolerance) == list(PALETTE).index(colour)


def shows(pixels: np.ndarray, shape: Shape, scene: Scene) -> bool:
    """Whether the shape's colour is there, uint8 (H, W, 3), and no other outline fits clearly better at its place.

    Where the scene without the shape has its colour anyway, the outline cannot be seen and is not judged.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = shape.box(width, height)
    match = has_colour(pixels[top:bottom, left:right], shape.colour)
    if match[shape.coverage(width, height) > 0.9].mean() < 0.6:
        return False
    without = replace(scene, shapes=tuple(s for s in scene.shapes if s != shape)).render(width, height)
    visible = ~has_colour(np.asarray(without)[top:bottom, left:right], shape.colour, tolerance=150.0)
    scores = {}
    for name in SHAPES:
        inside = replace(shape, name=name).coverage(width, height) > 0.5
        scores[name] = (match & inside & visible).sum() / max(1, ((match | inside) & visible).sum())
    # Blended edges decide between a small circle and a small square, hence the tenth.
    return scores[shape.name] >= 0.9 * max(scores.values())


def _still_there(pixels: np.ndarray, shape: Shape, source: np.ndarray, target: np.ndarray) -> bool:
    """Whether part of the shape's area still looks more like the source than like the target."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = shape.box(width, height)
    area = np.zeros((height, width), bool)
    area[top:bottom, left:right] = shape.coverage(width, height) > 0.9
    return _share_nearer(pixels, source, target, area) > 0.3


def _share_nearer(pixels: np.ndarray, this: np.ndarray, other: np.ndarray, area: np.ndarray) -> float:
    """Share of the pixels in `area`, bool (H, W), that are nearer to picture `this` than to `other`."""
    to_this, to_other = (np.abs(pixels[area] - picture[area]).sum(-1) for picture in (this, other))
    return float((to_this < to_other).mean())


def background_share(pixels: np.ndarray, scene: Scene) -> float:
    """Share of the area without shapes that has the background's colour."""
    return has_colour(pixels[free_area(scene, *pixels.shape[1::-1])], scene.background.name).mean()


def free_area(scene: Scene, width: int, height: int) -> np.ndarray:
    """Where no shape is, bool (height, width)."""
    free = np.ones((height, width), bool)
    for shape in scene.shapes:
        left, top, right, bottom = shape.box(width, height)
        free[top:bottom, left:right] &= shape.coverage(width, height) == 0
    return free


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[:1] in "aeiou" else "a"


def packaged_photos(split: str = "train") -> list[str]:
    """Paths of the photographs that scikit-image and this package ship for "train", "calibration" or "test"."""
    return [packaged_photo(*pair) for pair in PACKAGED_PHOTOS[split]]


def random_scene(rng: np.random.Generator, photos: list[str], shapes: int | None = None) -> Scene:
    """One to three shapes, no two alike or at one place, over a photograph (half), a gradient or a plain colour."""
    kind = rng.random()
    if kind < 0.5 and photos:
        path = photos[rng.integers(len(photos))]
        width, height = open_photo(path).size
        side = rng.uniform(0.45, 1.0) * min(width, height)
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        crop = (left / width, top / height, (left + side) / width, (top + side) / height)
        background = Background(photo=path, crop=crop)
    elif kind < 0.75:
        start, end = rng.integers(30, 226, (2, 3)).tolist()
        background = Background((tuple(start), tuple(end)), angle=rng.uniform(0, 2 * math.pi))
    else:
        name = str(rng.choice(list(PALETTE)))
        background = Background((PALETTE[name],), name=name)
    places = rng.permutation(len(PLACES))[: shapes or rng.integers(1, 4)]
    kinds = [(s, c) for s in SHAPES for c in PALETTE if c != background.name]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    return Scene(background, tuple(placed(kind, int(place), rng) for kind, place in zip(kinds, places)))


def placed(kind: tuple[str, str], place: int, rng: np.random.Generator) -> Shape:
    """A shape and colour at number `place` of `PLACES`, not quite in its middle."""
    row, column = divmod(place, 3)
    dx, dy = rng.uniform(-0.02, 0.02, 2)
    return Shape(*kind, PLACES[place], (column + 0.5) / 3 + dx, (row + 0.5) / 3 + dy, rng.uniform(0.135, 0.155))


def random_edit(seed: int, index: int, photos: list[str], operations: tuple[str, ...] = OPERATIONS) -> ShapeEdit:
    """Edit number `index` of `seed`: the same arguments always give the same edit."""
    rng = np.random.default_rng((seed, index))
    before = random_scene(rng, photos)
    return edit_scene(before, str(rng.choice(operations)), rng)


def picture_size(seed: int, index: int, side: int) -> tuple[int, int]:
    """Width and height for an edit: square in seven of ten cases, else portrait or landscape of long side `side`."""
    rng = np.random.default_rng((seed, index, 1))
    short = round(side * rng.uniform(0.6, 0.95)) if rng.random() < 0.3 else side
    return (side, short) if rng.random() < 0.5 else (short, side)


def edit_scene(before: Scene, operation: str, rng: np.random.Generator) -> ShapeEdit:
    """A random edit of the given kind, and one of its wordings."""
    shapes, background = list(before.shapes), before.background
    subject = int(rng.integers(len(shapes)))
    old = shapes[subject]
    taken = {(s.name, s.colour) for s in shapes}
    free = [i for i, place in enumerate(PLACES) if place not in {s.place for s in shapes}]
    words = {"old": old.colour, "shape": old.name}
    if operation == "recolour":
        used = {old.colour, background.name} | {c for s, c in taken if s == old.name}
        words["new"] = _pick(rng, [c for c in PALETTE if c not in used])
        shapes[subject] = replace(old, colour=words["new"])
    elif operation == "remove":
        del shapes[subject]
    elif operation == "add":
        new = _pick(rng, [(s, c) for s in SHAPES for c in PALETTE if c != background.name and (s, c) not in taken])
        place = _pick(rng, free)
        row, column = divmod(place, 3)
        shapes.append(Shape(*new, PLACES[place], (column + 0.5) / 3, (row + 0.5) / 3, 0.145))
        words = {"a": article(new[1]), "new": new[1], "shape": new[0], "place": PLACES[place]}
    elif operation == "move":
        place = _pick(rng, free)
        row, column = divmod(place, 3)
        shapes[subject] = replace(old, place=PLACES[place], x=(column + 0.5) / 3, y=(row + 0.5) / 3)
        words["place"] = PLACES[place]
    elif operation == "replace":
        words["other"] = _pick(rng, [s for s in SHAPES if (s, old.colour) not in taken])
        shapes[subject] = replace(old, name=words["other"])
    elif operation == "background":
        name = _pick(rng, [c for c in PALETTE if c != background.name and c not in {s.colour for s in shapes}])
        background = Background((PALETTE[name],), name=name)
        words = {"a": article(name), "new": name}
    else:
        raise ValueError(f"Unknown edit operation {operation!r}; choose from {', '.join(OPERATIONS)}")
    instruction = _pick(rng, WORDINGS[operation]).format(**words)
    if rng.random() < 0.5:
        instruction = instruction[0].upper() + instruction[1:] + "."
    return ShapeEdit(operation, instruction, before, Scene(background, tuple(shapes)))


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]
