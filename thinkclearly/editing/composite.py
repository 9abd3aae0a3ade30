"""Putting untouched source pixels back: mask cleaning, feathering, and the composite at the source's own size.

Works on pictures of any resolution. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import convolve, distance_transform_edt

from thinkclearly.colour import with_metadata
from thinkclearly.images import Letterbox

BAND = 512  # rows that are blended at a time


def smooth_mask(clear: np.ndarray, ksize: int, passes: int) -> np.ndarray:
    """Majority filter over the token grid, bool (g, g): the original's anti-blockiness step.

    A patch becomes CLEAR where at least `ksize² // 2 + 1` of its `ksize`×`ksize` neighbours are; edges are repeated.
    """
    if ksize % 2 == 0 or ksize < 1:
        raise ValueError(f"mask_smooth_ksize={ksize}; expected an odd number, 1 to leave the mask as it is")
    for _ in range(passes if ksize > 1 else 0):
        votes = convolve(clear.astype(np.int32), np.ones((ksize, ksize), np.int32), mode="nearest")
        clear = votes >= ksize**2 // 2 + 1
    return clear


def assemble(
    source: Image.Image, pictures: Sequence[Image.Image], rows: np.ndarray, letterbox: Letterbox
) -> Image.Image:
    """The picture that instructed patches are copied from: the source, and where an instruction holds its transform.

    Args:
        pictures: each instruction's transform of the source, of its size and mode.
        rows: int (g, g), number of the instruction that a patch has, -1 for none.
    """
    others = [(row, picture) for row, picture in enumerate(pictures) if picture is not source and (rows == row).any()]
    if not others:
        return source
    base = np.asarray(source).copy()
    for row, picture in others:
        inside = letterbox.unfit_grid(rows == row)
        base[inside] = np.asarray(picture)[inside]
    return Image.fromarray(base, source.mode)


def composite(
    source: Image.Image,
    edited: Image.Image,
    clear: np.ndarray,
    letterbox: Letterbox,
    feather_radius_px: float,
    feather: str = "inside",
) -> tuple[Image.Image, np.ndarray]:
    """Source where a patch is CLEAR, edited elsewhere, at the source's own size.

    Args:
        source: RGB or RGBA, W×H: the photo as it came, or what `assemble` made of it.
        edited: of the same mode and size, the decoded picture in the source's colours; see `colour.painted`.
        clear: bool (g, g), True where the patch is the source.
        letterbox: geometry between the two.
        feather_radius_px: width of the transition, pixels of the model's square; 0 for a hard edge.
        feather: `"inside"` keeps every pixel of a CLEAR patch byte for byte and blends on the edited side only;
            `"two_sided"` is the original's Gaussian blur of the mask, which leaks both ways.

    Returns:
        The composite, with the source's metadata, and bool (H, W): the pixels that are the source's own, untouched by
        the blend.
    """
    if feather not in ("inside", "two_sided"):
        raise ValueError(f"feather={feather!r}; choose 'inside' or 'two_sided'")
    clear_pixels = letterbox.unfit_grid(clear)
    radius = feather_radius_px * max(letterbox.width, letterbox.height) / letterbox.size
    base, new = np.asarray(source), np.asarray(edited)
    result, kept = base.copy(), np.empty(base.shape[:2], bool)
    if feather == "two_sided":
        alpha = np.asarray(Image.fromarray(np.uint8(clear_pixels) * 255).filter(ImageFilter.GaussianBlur(radius)))
    # A large photograph is blended in bands: floating point copies of all of it would be many times its size.
    for top in range(0, len(base), BAND):
        rows = slice(top, top + BAND)
        if feather == "two_sided":
            share = 1 - alpha[rows].astype(np.float32) / 255
        else:
            share = _inside_share(clear_pixels, rows, radius)
        blended = share > 0
        kept[rows] = ~blended
        share = share[blended][:, None]
        blend = base[rows][blended] * (1 - share) + new[rows][blended] * share
        result[rows][blended] = np.rint(blend).astype(np.uint8)
    return with_metadata(Image.fromarray(result), source.info), kept


def _inside_share(clear_pixels: np.ndarray, rows: slice, radius: float) -> np.ndarray:
    """Share of the edited picture in some rows, float32: 0 in CLEAR patches, 1 from `radius` + 1 pixels away."""
    # Distances above radius + 1 make no difference, so rows further away need not be looked at.
    first = max(0, rows.start - math.ceil(radius) - 1)
    nearby = ~clear_pixels[first : rows.stop + math.ceil(radius) + 1]
    if nearby.all():
        share = np.ones(nearby.shape, np.float32)
    else:
        share = np.clip(distance_transform_edt(nearby) / (radius + 1), 0, 1).astype(np.float32)
    return share[rows.start - first :][:BAND]
