"""Result folders on disk → metrics, heat maps and tables; the job behind `thinkclearly evaluate DIR`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image

from thinkclearly.evaluation.metrics import (
    aggregate_clear_metrics,
    aggregate_image_metrics,
    clear_metrics,
    image_metrics,
)
from thinkclearly.files import write_json
from thinkclearly.images import MASK_THRESHOLD, load_image, load_mask
from thinkclearly.reporting.pictures import heat_map
from thinkclearly.reporting.tables import markdown

logger = logging.getLogger(__name__)

SOURCES = ("input_image.png", "source.png")
PREDICTIONS = ("raw_model", "token_composite", "pixel_composite", "copy_matching_tokens", "input_decoded")
COPY = "copy_source"


def evaluate_folder(directory: str | os.PathLike) -> dict:
    """Measure one result folder, or every result folder directly inside a folder.

    A result folder holds `input_image.png` (or `source.png`) and at least one of `raw_model.png`,
    `token_composite.png`, `pixel_composite.png`, `copy_matching_tokens.png` and `input_decoded.png`, all of the
    source's size. Optional:

    - `mask.png`: the true edit, white where edited (or transparent, as MagicBrush). Splits every comparison into
      inside and outside. Without it `clear_mask.png` does, which then says how far the model kept its own word, not
      how well it chose.
    - `clear_mask.png`: what the model left alone, white where CLEAR; compared with `mask.png` pixel by pixel.
    - `target.png`: the wanted picture; everything is compared with it, too.
    - `result.json`, as `EditResult.save` writes it: add `target_tokens`, the target's codes, and its `clear` (a grid
      of 0 and 1) is compared with the positions where the target has the token of `source_tokens`.

    Preservation metrics reward doing nothing, so there is always a row `copy_source`, the source as prediction.

    Written: `NAME_vs_input_heatmap.png` for each prediction, in its folder; and `metrics.json` in `directory`, which
    is the returned dict with infinities as the string "inf" (JSON has none; `float("inf")` reads it).

    Args:
        directory (`str` or `os.PathLike`): the folder.

    Returns:
        `dict`: `directory`; `pictures`, folder name → `{"region", "source", "target", "clear_pixels",
        "clear_tokens"}` with `image_metrics` by prediction or `clear_metrics`, where they could be had; `summary`, the
        same aggregated over the folders; `table`, the summary as Markdown, which is logged as well.

    Raises:
        FileNotFoundError: no such folder, no result folder in it, or a folder of predictions without a source.
        ValueError: a picture that cannot be read or is not of the source's size, no predictions, or token lists that
            do not fit; the message names the file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a folder; give a result folder or a folder of result folders.")
    folders = [directory] if _holds_pictures(directory) else [p for p in sorted(directory.iterdir()) if p.is_dir()]
    folders = [folder for folder in folders if _holds_pictures(folder)]
    if not folders:
        raise FileNotFoundError(f"{directory} and the folders in it hold none of {', '.join(SOURCES)}.")

    pictures = {folder.resolve().name: _evaluate_one(folder) for folder in folders}
    summary = _summarise(list(pictures.values()))
    table = _summary_table(summary)
    result = {"directory": str(directory), "pictures": pictures, "summary": summary, "table": table}
    path = directory / "metrics.json"
    write_json(path, result)
    logger.info("%d result folder(s) in %s; metrics in %s\n\n%s", len(folders), directory, path, table)
    return result


def _holds_pictures(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (*SOURCES, *(f"{name}.png" for name in PREDICTIONS)))


def _evaluate_one(folder: Path) -> dict:
    source_path = next((folder / name for name in SOURCES if (folder / name).is_file()), None)
    if source_path is None:
        raise FileNotFoundError(f"{folder} has predictions but no source; expected {' or '.join(SOURCES)} there.")
    source = load_image(source_path)
    predictions = {name: folder / f"{name}.png" for name in PREDICTIONS if (folder / f"{name}.png").is_file()}
    if not predictions:
        expected = ", ".join(f"{name}.png" for name in PREDICTIONS)
        raise ValueError(f"{folder} has a source but nothing to compare with it; expected any of {expected}.")
    predictions = {name: _sized(load_image(path), path, source, source_path) for name, path in predictions.items()}
    for name, prediction in predictions.items():
        heat_map(prediction, source, bar=True).save(folder / f"{name}_vs_input_heatmap.png")
    predictions[COPY] = source

    edited = _mask(folder / "mask.png", source, source_path)
    clear = _mask(folder / "clear_mask.png", source, source_path)
    region, name = edited, "mask.png"
    if edited is None and clear is not None:
        region, name = ~clear, "clear_mask.png"
    result = {"region": None if region is None else name}
    result["source"] = {name: image_metrics(picture, source, region) for name, picture in predictions.items()}
    target_path = folder / "target.png"
    if target_path.is_file():
        target = _sized(load_image(target_path), target_path, source, source_path)
        result["target"] = {name: image_metrics(picture, target, region) for name, picture in predictions.items()}
    if edited is not None and clear is not None:
        result["clear_pixels"] = clear_metrics(clear.ravel(), ~edited.ravel())
    tokens = _token_metrics(folder / "result.json")
    return result | ({"clear_tokens": tokens} if tokens else {})


def _sized(picture: Image.Image, path: Path, source: Image.Image, source_path: Path) -> Image.Image:
    if picture.size != source.size:
        raise ValueError(
            f"{path} is {picture.width}x{picture.height} but {source_path.name} is {source.width}x{source.height}. "
            "Pictures are compared at the source's size only: resizing would blur exact copies. Save it at that size."
        )
    return picture


def _mask(path: Path, source: Image.Image, source_path: Path) -> np.ndarray | None:
    if not path.is_file():
        return None
    mask = load_mask(path)
    if mask is None:
        raise ValueError(f"{path} is a colour picture, not a mask; expected black and white.")
    return np.asarray(_sized(mask, path, source, source_path)) > MASK_THRESHOLD


def _token_metrics(path: Path) -> dict | None:
    """`clear_metrics` of the lists in a result.json, or `None` where it has not got all three."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    names = ("clear", "source_tokens", "target_tokens")
    if not isinstance(record, dict) or any(not isinstance(record.get(name), list) for name in names):
        return None
    try:
        clear, source, target = (np.array(record[name], int).ravel() for name in names)
        return clear_metrics(clear == 1, source == target)
    except (TypeError, ValueError) as error:  # ragged, not numbers, or of different lengths
        raise ValueError(f"{path}: {', '.join(names)} do not fit together ({error}).") from error


def _summarise(pictures: list[dict]) -> dict:
    regions = sorted({picture["region"] or "none" for picture in pictures})
    summary = {"region": None if regions == ["none"] else " and ".join(regions)}
    for key in ("source", "target"):
        compared = [picture[key] for picture in pictures if key in picture]
        if compared:
            names = [name for name in (*PREDICTIONS, COPY) if any(name in rows for rows in compared)]
            summary[key] = {
                name: aggregate_image_metrics([rows[name] for rows in compared if name in rows]) for name in names
            }
    for key in ("clear_pixels", "clear_tokens"):
        rows = [picture[key] for picture in pictures if key in picture]
        if rows:
            summary[key] = aggregate_clear_metrics(rows)
    return summary


def _summary_table(summary: dict) -> str:
    edit = f" (edit: {summary['region']})" if summary["region"] else ""
    blocks = [markdown(summary[key], f"Against the {key}{edit}") for key in ("source", "target") if key in summary]
    clear = {"clear_pixels": "clear_mask.png against mask.png", "clear_tokens": "tokens against the target's"}
    rows = {label: summary[key] for key, label in clear.items() if key in summary}
    return "\n".join(blocks + ([markdown(rows, "CLEAR decisions")] if rows else []))
