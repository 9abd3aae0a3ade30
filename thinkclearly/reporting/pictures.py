"""Pictures about pictures: where two differ, what was edited, and sheets to look at side by side.

PIL in, PIL out. Knows nothing of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageDraw, ImageFont

HEAT_TOP = 64  # levels; this much and more is the brightest colour
FONT = Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")  # Pillow's own font lacks most of Unicode
INK, PAPER = (32, 33, 36), (255, 255, 255)

# 0 levels is black and nothing else is: the faintest difference already stands out from an exact copy.
HEAT_COLOURS = np.vstack(
    [np.zeros((1, 3), np.uint8), colormaps["inferno"](np.linspace(0.2, 1, HEAT_TOP), bytes=True)[:, :3]]
)


def heat_map(a: Image.Image, b: Image.Image, bar: bool = False) -> Image.Image:
    """The largest absolute difference over the channels at each pixel, as a colour.

    The scale is fixed, so that heat maps can be compared with each other: black is *bit-identical*, 1 level is dark
    violet, and matplotlib's `inferno` rises from there to pale yellow at 64 levels of 255 and more.

    Args:
        a, b (`PIL.Image.Image`): two pictures of one size, compared as RGB.
        bar (`bool`, *optional*, defaults to `False`): add the colour scale under the picture, which makes it taller
            (and at least 200 pixels wide).

    Returns:
        `PIL.Image.Image`: RGB, without the bar of the size of `a`.

    Raises:
        ValueError: the sizes differ.
    """
    if a.size != b.size:
        raise ValueError(f"Cannot map the difference of {a.size} and {b.size}; the pictures must have one size.")
    difference = np.abs(np.asarray(a.convert("RGB")).astype(np.int16) - np.asarray(b.convert("RGB"))).max(-1)
    picture = Image.fromarray(HEAT_COLOURS[np.minimum(difference, HEAT_TOP)])
    return _with_bar(picture) if bar else picture


def red_overlay(image: Image.Image, mask: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """The picture with the edited area in red; everything else is left bit-identical.

    Args:
        image (`PIL.Image.Image`): any mode, shown as RGB.
        mask: bool (H, W), True where edited. For a grid of patches see `mask_image` and `images.Letterbox`.
        opacity (`float`, *optional*, defaults to 0.5): share of red, 0 to 1.
    """
    if mask.dtype != np.bool_ or mask.shape != (image.height, image.width):
        raise ValueError(f"The mask is {mask.dtype} {mask.shape}; expected bool {(image.height, image.width)}.")
    pixels = np.array(image.convert("RGB"))
    red = np.array((255, 0, 0))
    pixels[mask] = (pixels[mask] * (1 - opacity) + red * opacity).round().astype(np.uint8)
    return Image.fromarray(pixels)


def mask_image(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A grid of patches as a picture: mode "L", 255 where the mask is True, patches as hard-edged blocks.

    Args:
        mask: bool (rows, columns), or (N,) for a square grid in raster order.
        size (`tuple[int, int]`): width and height of the picture in pixels.
    """
    if mask.ndim == 1 and math.isqrt(len(mask)) ** 2 == len(mask):
        mask = mask.reshape(math.isqrt(len(mask)), -1)
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(
            f"The mask is {mask.dtype} {mask.shape}; expected bool (rows, columns), or (N,) with N square."
        )
    return Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)


def sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], cell: int = 256) -> Image.Image:
    """A contact sheet: pictures in rows and columns, each over its caption.

    Args:
        rows: pictures with their captions; rows may differ in length. Captions wrap and are never cut.
        cell (`int`, *optional*, defaults to 256): width of a column in pixels. Each picture is scaled to
            this width, or to twice this height if it is taller: smoothly to shrink, in hard-edged blocks to grow.

    Returns:
        `PIL.Image.Image`: RGB, dark captions on white.
    """
    gap, font = 12, ImageFont.truetype(FONT, 13)
    line = sum(font.getmetrics()) + 2
    cells = [[(_fit(picture, cell), _wrap(caption, font, cell)) for picture, caption in row] for row in rows]
    heights = [max(picture.height + 4 + line * len(lines) for picture, lines in row) for row in cells]
    columns = max(len(row) for row in cells)
    canvas = Image.new("RGB", (gap + columns * (cell + gap), gap + sum(heights) + gap * len(heights)), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = gap
    for row, height in zip(cells, heights):
        for column, (picture, lines) in enumerate(row):
            left = gap + column * (cell + gap)
            canvas.paste(picture, (left, top))
            draw.text((left, top + picture.height + 4), "\n".join(lines), INK, font, spacing=2)
        top += height + gap
    return canvas


def _with_bar(picture: Image.Image) -> Image.Image:
    margin, thickness, font = 10, 12, ImageFont.truetype(FONT, 11)
    width = max(picture.width, 200)
    canvas = Image.new("RGB", (width, picture.height + 44), PAPER)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    span, top = width - 2 * margin, picture.height + 8
    steps = np.arange(span) * (HEAT_TOP + 1) // span
    canvas.paste(Image.fromarray(np.tile(HEAT_COLOURS[steps], (thickness, 1, 1))), (margin, top))
    for level in (0, 16, 32, 48, HEAT_TOP):
        text, anchor = (f"≥{level}", "rt") if level == HEAT_TOP else (str(level), "mt")
        x = width - margin if level == HEAT_TOP else margin + (level + 0.5) * span / (HEAT_TOP + 1)
        draw.text((x, top + thickness + 4), text, INK, font, anchor=anchor)
    return canvas


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    scale = min(cell / picture.width, 2 * cell / picture.height)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider by itself is broken."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [text_line for text_line in lines if text_line]
