"""Numbers about edited pictures and CLEAR masks: numpy in, numbers out.

Two kinds of statement: how far a picture is from another one, whole and inside and outside an edit mask; and how well
predicted CLEAR positions agree with the true ones. Knows nothing of models, tokens, files or tables.

A number that does not exist (an empty region, nothing predicted) is `None`: never 0, never NaN, and never in a mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

MAX_LEVEL = 255
SSIM_RADIUS = 5  # of the 11 x 11 Gaussian window (sigma 1.5, cut at 3.5 sigma) of Wang et al. 2004
REGIONS = ("", "_inside", "_outside")
CLEAR_COUNTS = ("clear_both", "clear_predicted", "clear_true", "positions")


def image_metrics(
    prediction: np.ndarray | Image.Image,
    reference: np.ndarray | Image.Image,
    mask: np.ndarray | None = None,
    ssim: bool = True,
) -> dict[str, float | int | None]:
    """Compare two pictures, whole and, where there is a mask, inside and outside it.

    Each key exists plain (whole picture) and, with a mask, ending in `_inside` and `_outside`:

    - `pixels`: size of the region.
    - `mse`: mean squared difference in levels², over the region's own pixels and channels, Σ(d²·M) / (C·ΣM), as
      GIE-Bench does. PnPInversion divides by the whole frame, which flatters large masks.
    - `psnr`: 10·log10(255² / mse) in dB; `inf` where the region is an exact copy.
    - `ssim`: mean of the SSIM map over the region (Gaussian window, sigma 1.5, population covariance; Wang et al.
      2004). As usual the 5 pixels along the picture's border are left out. Windows centred within 5 pixels of the
      mask's border also see the other side, so an exact copy may score a little under 1 outside: ask `exact` instead.
    - `max_abs`: largest absolute difference, in levels.
    - `exact`: share of pixels that agree in every channel, 0 to 1.

    Args:
        prediction, reference: uint8 (H, W, C), or PIL pictures, which are compared as RGB.
        mask (`numpy.ndarray`, *optional*): bool (H, W), True where the picture was to be edited.
        ssim (`bool`, defaults to `True`): whether to compute `ssim`, which takes nearly all of the time.

    Returns:
        `dict`: Python numbers; `None` for every number of an empty region, and for `ssim` of pictures with a side
        under 11 or regions within the border, or where it was not asked for.

    Raises:
        ValueError: not uint8 (H, W, C), different shapes, or a mask that is not bool (H, W).
    """
    prediction, reference = _pixels(prediction, "prediction"), _pixels(reference, "reference")
    if prediction.shape != reference.shape:
        raise ValueError(
            f"The prediction is {_size(prediction)} and the reference {_size(reference)}; they must have one size. "
            "Resize neither: compare at the resolution they were made for."
        )
    if mask is not None and (mask.dtype != np.bool_ or mask.shape != reference.shape[:2]):
        raise ValueError(f"The mask is {mask.dtype} {mask.shape}; expected bool {reference.shape[:2]}.")

    difference = np.abs(prediction.astype(np.int16) - reference)
    largest = difference.max(-1)
    squares = np.square(difference, dtype=np.int32).sum(-1)
    nowhere = np.zeros(squares.shape, bool)
    similarity, valid = _similarity_map(prediction, reference) if ssim else (nowhere, nowhere)
    whole = np.ones(squares.shape, bool)
    regions = (whole,) if mask is None else (whole, mask, ~mask)

    result = {}
    for suffix, region in zip(REGIONS, regions):
        pixels = int(region.sum())
        mse = squares[region].sum(dtype=np.int64).item() / (pixels * reference.shape[-1]) if pixels else None
        windows = region & valid
        result |= {
            f"pixels{suffix}": pixels,
            f"mse{suffix}": mse,
            f"psnr{suffix}": _psnr(mse),
            f"ssim{suffix}": similarity[windows].mean().item() if windows.any() else None,
            f"max_abs{suffix}": largest[region].max().item() if pixels else None,
            f"exact{suffix}": (largest[region] == 0).mean().item() if pixels else None,
        }
    return result


def aggregate_image_metrics(rows: Sequence[Mapping[str, float | int | None]]) -> dict[str, float | int | None]:
    """Summarise `image_metrics` of several pictures.

    `mse`, `psnr`, `ssim` and `exact` become means over the pictures that have them; `max_abs` the largest; `pixels`
    the sum. Because one exact copy makes the mean PSNR infinite, `mse_pooled` (all pixels of all pictures as one,
    so weighted by region size) and the `psnr_pooled` that follows from it are added, each with its region suffix.
    `pictures` counts the rows.
    """
    if not rows:
        raise ValueError("There are no pictures to summarise; give at least one row of image_metrics.")
    result: dict[str, float | int | None] = {"pictures": len(rows)}
    for suffix in REGIONS:
        present = [row for row in rows if row.get(f"pixels{suffix}")]
        if not any(f"pixels{suffix}" in row for row in rows):
            continue
        pixels = sum(row[f"pixels{suffix}"] for row in present)
        pooled = sum(row[f"mse{suffix}"] * row[f"pixels{suffix}"] for row in present) / pixels if pixels else None
        result[f"pixels{suffix}"] = pixels
        for name in ("mse", "psnr", "ssim", "exact"):
            values = [row[name + suffix] for row in present if row[name + suffix] is not None]
            result[name + suffix] = sum(values) / len(values) if values else None
        result[f"max_abs{suffix}"] = max((row[f"max_abs{suffix}"] for row in present), default=None)
        result[f"mse_pooled{suffix}"] = pooled
        result[f"psnr_pooled{suffix}"] = _psnr(pooled)
    return result


def clear_metrics(predicted_mask: np.ndarray, true_mask: np.ndarray) -> dict[str, float | int | None]:
    """Agreement of predicted CLEAR positions with the true ones.

    `precision`, `recall` and `f1` take CLEAR as the positive class. `edit_iou` is the intersection over union of the
    *edited* regions (not CLEAR): low recall of edits punches holes into them and shows here even where nearly all of
    the picture is CLEAR. `f1_always_clear` is the F1 of calling everything CLEAR, which is high where edits are
    small: `f1` means something only above it. `clear_rate_predicted` and `clear_rate_true` are shares of all
    positions. The four counts (`clear_both`, `clear_predicted`, `clear_true`, `positions`) are what
    `aggregate_clear_metrics` pools.

    Args:
        predicted_mask, true_mask: bool (N,), True where CLEAR.

    Returns:
        `dict`: `None` where a ratio has nothing to divide by, e.g. `edit_iou` where neither mask has an edit.

    Raises:
        ValueError: masks that are not bool, not (N,), or differ in length.
    """
    for mask, name in ((predicted_mask, "predicted"), (true_mask, "true")):
        if mask.dtype != np.bool_ or mask.ndim != 1:
            raise ValueError(f"The {name} CLEAR mask is {mask.dtype} {mask.shape}; expected bool (N,).")
    if len(predicted_mask) != len(true_mask):
        raise ValueError(
            f"{len(predicted_mask)} predicted positions but {len(true_mask)} true ones; expected as many."
        )
    counts = ((predicted_mask & true_mask).sum(), predicted_mask.sum(), true_mask.sum(), len(true_mask))
    return _clear_ratios(*(int(count) for count in counts))


def aggregate_clear_metrics(rows: Sequence[Mapping[str, float | int | None]]) -> dict[str, float | int | None]:
    """`clear_metrics` of all positions of all pictures taken as one, from the rows' counts; `pictures` counts them."""
    if not rows:
        raise ValueError("There are no pictures to summarise; give at least one row of clear_metrics.")
    totals = [sum(row[name] for row in rows) for name in CLEAR_COUNTS]
    return {"pictures": len(rows)} | _clear_ratios(*totals)


def _pixels(picture: np.ndarray | Image.Image, name: str) -> np.ndarray:
    pixels = np.asarray(picture.convert("RGB")) if isinstance(picture, Image.Image) else picture
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or not pixels.size:
        raise ValueError(f"The {name} is {pixels.dtype} {pixels.shape}; expected uint8 (height, width, channels).")
    return pixels


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]} with {pixels.shape[2]} channels"


def _psnr(mse: float | None) -> float | None:
    if mse is None:
        return None
    return 10 * math.log10(MAX_LEVEL**2 / mse) if mse else math.inf


def _similarity_map(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSIM per pixel, mean over channels (H, W), and where its window lies inside the picture, bool (H, W)."""
    valid = np.zeros(reference.shape[:2], bool)
    valid[SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS] = True
    if min(valid.shape) <= 2 * SSIM_RADIUS:
        return np.zeros(valid.shape), np.zeros_like(valid)
    _, similarity = structural_similarity(
        prediction,
        reference,
        data_range=MAX_LEVEL,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return similarity.mean(-1), valid


def _clear_ratios(both: int, predicted: int, true: int, positions: int) -> dict[str, float | int | None]:
    def ratio(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return {
        "precision": ratio(both, predicted),
        "recall": ratio(both, true),
        "f1": ratio(2 * both, predicted + true),
        "f1_always_clear": ratio(2 * true, positions + true),
        "edit_iou": ratio(positions - (predicted + true - both), positions - both),
        "clear_rate_predicted": ratio(predicted, positions),
        "clear_rate_true": ratio(true, positions),
    } | dict(zip(CLEAR_COUNTS, (both, predicted, true, positions)))
