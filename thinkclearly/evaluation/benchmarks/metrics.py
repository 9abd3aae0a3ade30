"""The field's numbers on pictures: MagicBrush's and PIE-Bench's metrics, each as its authors compute it.

Pictures and towers in, numbers out, in the units of the published tables (`COLUMNS`). A number that does not exist is
`None` and in no mean. Knows nothing of files, models or who made the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from thinkclearly.evaluation.benchmarks.towers import Clip, Dino
from thinkclearly.evaluation.metrics import image_metrics

COPY, TARGET = "copy_source", "target"
_OUTSIDE = {
    "mse_outside": ("MSE outside the mask ↓", "{:.2f}"),
    "exact_outside": ("Exact pixels outside", "%"),
}
# benchmark → column → heading, format
COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "magicbrush": {
        "l1": ("L1 ↓", "{:.4f}"),
        "l2": ("L2 ↓", "{:.4f}"),
        "clip_i": ("CLIP-I ↑", "{:.4f}"),
        "dino": ("DINO ↑", "{:.4f}"),
        "clip_t": ("CLIP-T ↑", "{:.4f}"),
        **_OUTSIDE,
    },
    "pie-bench": {
        "structure": ("Structure ×10³ ↓", "{:.2f}"),
        "psnr": ("PSNR dB ↑", "{:.2f}"),
        "psnr_pooled": ("PSNR dB, pooled ↑", "{:.2f}"),
        "lpips": ("LPIPS ×10³ ↓", "{:.2f}"),
        "mse": ("MSE ×10⁴ ↓", "{:.2f}"),
        "ssim": ("SSIM ×10² ↑", "{:.2f}"),
        "clip_whole": ("CLIP whole ↑", "{:.2f}"),
        "clip_edited": ("CLIP edited ↑", "{:.2f}"),
        **_OUTSIDE,
    },
}


@dataclass(frozen=True)
class Item:
    """One edit to be measured.

    Attributes:
        predictions: method → RGB picture; the same methods in every item of a batch.
        source: RGB, what was edited; in a session, the first picture of all.
        caption: the words that CLIP compares with, or `None`.
        target: RGB, the wanted picture, where the benchmark has one.
        mask: bool (H, W) of the source's size, True where edited, or `None`.
    """

    predictions: dict[str, Image.Image]
    source: Image.Image
    caption: str | None
    target: Image.Image | None = None
    mask: np.ndarray | None = None


def magicbrush(batch: Sequence[Item], clip: Clip | None = None, dino: Dino | None = None) -> list[dict[str, dict]]:
    """MagicBrush's five numbers against the target, and what changed outside the human mask against the source.

    - `l1`, `l2`: mean absolute and mean squared difference on [0, 1], the whole picture, brought to the target's size.
    - `clip_i`, `dino`: cosine of the towers' picture vectors and the target's.
    - `clip_t`: cosine of the picture's and the caption's CLIP vectors.
    - `mse_outside`, `exact_outside`: see `preservation`; where there is a mask.

    Source: `OSU-NLP-Group/MagicBrush/evaluation/image_eval.py`, with ViT-B/32 and dino_vits16.

    Returns:
        `list[dict]`: an item's rows: its methods, `copy_source`, and `target`, the wanted picture as a prediction,
        whose `clip_t` the authors call the oracle; row → column → number or `None`.
    """
    pictures = [{**item.predictions, COPY: item.source, TARGET: item.target} for item in batch]
    results = [
        {
            name: distances(picture, item.target) | preservation(picture, item.source, item.mask)
            for name, picture in rows.items()
        }
        for item, rows in zip(batch, pictures)
    ]
    flat = [picture for rows in pictures for picture in rows.values()]
    seen = {
        column: None if tower is None else _per_item(tower.images(flat), batch)
        for column, tower in (("clip_i", clip), ("dino", dino))
    }
    for column, vectors in seen.items():
        _write(results, column, None if vectors is None else (vectors * vectors[:, -1:]).sum(-1))
    _write(results, "clip_t", None if clip is None else _to_captions(seen["clip_i"], batch, clip))
    return results


def pie_bench(
    batch: Sequence[Item], clip: Clip | None = None, dino: Dino | None = None, lpips: Callable | None = None
) -> list[dict[str, dict]]:
    """PIE-Bench's numbers: background and structure against the source, CLIP against the caption.

    - `structure`: mean squared difference of `Dino.structure`, ×10³, whole picture.
    - `mse` (×10⁴), `ssim` (×10²), `lpips` (×10³): both pictures on [0, 1] with the edited part set to zero, over the
      *whole* frame; a large mask flatters them. PSNR follows from each picture's `mse` in `summarise`. None of them
      where everything is edited.
    - `clip_whole`, `clip_edited`: 100 · cosine, not under 0, of the picture, or of it with the rest set to zero.
    - `mse_outside`, `exact_outside`: see `preservation`.

    Source: `cure-lab/PnPInversion/evaluation/{evaluate,matrics_calculator}.py`, with ViT-L/14 and dino_vitb8.

    Args:
        lpips: (prediction, reference), float32 (1, 3, H, W) on [-1, 1] → distance.

    Returns:
        `list[dict]`: an item's rows: its methods and `copy_source`; row → column → number or `None`.
    """
    pictures = [{**item.predictions, COPY: item.source} for item in batch]
    results = [
        {
            name: _background(picture, item, lpips) | preservation(picture, item.source, item.mask)
            for name, picture in rows.items()
        }
        for item, rows in zip(batch, pictures)
    ]
    flat = [picture for rows in pictures for picture in rows.values()]
    maps = None if dino is None else _per_item(dino.structure(flat), batch)
    _write(results, "structure", None if maps is None else 1e3 * (maps - maps[:, -1:]).square().mean((2, 3)))
    edited = [_masked(picture, item.mask) for item, rows in zip(batch, pictures) for picture in rows.values()]
    for column, shown in (("clip_whole", flat), ("clip_edited", edited)):
        values = None if clip is None else _to_captions(_per_item(clip.images(shown), batch), batch, clip)
        _write(results, column, None if values is None else 100 * values.clamp(min=0))
    return results


def distances(prediction: Image.Image, target: Image.Image) -> dict[str, float]:
    """`l1` and `l2` on [0, 1], the prediction brought to the target's size (bicubic) as MagicBrush's authors do."""
    prediction = prediction if prediction.size == target.size else prediction.resize(target.size)
    difference = (np.asarray(prediction, np.float64) - np.asarray(target, np.float64)) / 255
    return {"l1": np.abs(difference).mean().item(), "l2": np.square(difference).mean().item()}


def preservation(prediction: Image.Image, source: Image.Image, mask: np.ndarray | None) -> dict[str, float | None]:
    """`mse_outside`, levels² over the unedited part's own pixels as GIE-Bench normalises it; `exact_outside`, a share.

    Without GIE-Bench's alignment of the two pictures, which would blur an exact copy. `None` without a mask, where
    everything is edited, and for a prediction of another size (a published target, say).
    """
    if mask is None or prediction.size != source.size:
        return dict.fromkeys(_OUTSIDE)
    found = image_metrics(prediction, source, mask, ssim=False)
    return {name: found[name] for name in _OUTSIDE}


def summarise(rows: Sequence[dict[str, float | None]]) -> dict[str, float | int | None]:
    """Mean of each column over the pictures that have it, every picture alike; `pictures` counts the rows.

    From `mse` follow `psnr`, the mean over pictures that the field reports (infinite as soon as one is an exact
    copy), and `psnr_pooled`, that of the mean `mse`.
    """
    result: dict[str, float | int | None] = {"pictures": len(rows)}
    for column in rows[0]:
        values = [row[column] for row in rows if row[column] is not None]
        result[column] = sum(values) / len(values) if values else None
        if column == "mse":
            result["psnr"] = sum(map(_psnr, values)) / len(values) if values else None
            result["psnr_pooled"] = _psnr(result["mse"]) if values else None
    return result


def _psnr(mse: float) -> float:
    """dB on [0, 1]; `mse` ×10⁴."""
    return -10 * math.log10(mse / 1e4) if mse else math.inf


def _background(prediction: Image.Image, item: Item, lpips: Callable | None) -> dict[str, float | None]:
    if item.mask.all():
        return dict.fromkeys(("mse", "ssim", "lpips"))
    a, b = (_masked(picture, ~item.mask) for picture in (prediction, item.source))
    a, b = (torch.from_numpy(np.asarray(p, np.float32) / 255).permute(2, 0, 1)[None] for p in (a, b))
    return {
        "mse": 1e4 * (a - b).double().square().mean().item(),
        "ssim": 1e2 * structural_similarity_index_measure(a, b, data_range=1.0).item(),
        "lpips": None if lpips is None else 1e3 * float(lpips(2 * a - 1, 2 * b - 1)),
    }


def _masked(picture: Image.Image, shown: np.ndarray) -> Image.Image:
    """Black where not shown."""
    pixels = np.asarray(picture)
    if pixels.shape[:2] != shown.shape:
        raise ValueError(
            f"a picture of {picture.width}x{picture.height} with a mask of {shown.shape}; expected one size"
        )
    return Image.fromarray(pixels * shown[..., None])


def _per_item(values: torch.Tensor, batch: Sequence[Item]) -> torch.Tensor:
    """(items · rows, …) → (items, rows, …)."""
    return values.unflatten(0, (len(batch), -1))


def _to_captions(vectors: torch.Tensor, batch: Sequence[Item], clip: Clip) -> torch.Tensor:
    """Cosines (items, rows); NaN where an item has no caption."""
    words = clip.texts([item.caption or "" for item in batch])
    cosines = (vectors * words[:, None]).sum(-1)
    cosines[torch.tensor([item.caption is None for item in batch])] = math.nan
    return cosines


def _write(results: list[dict[str, dict]], column: str, values: torch.Tensor | None) -> None:
    """Into the items' rows; `None` where there is no tower or no caption."""
    for i, rows in enumerate(results):
        for k, row in enumerate(rows.values()):
            value = math.nan if values is None else values[i, k].item()
            row[column] = None if math.isnan(value) else value
