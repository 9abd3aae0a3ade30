"""Metrics as text: which columns, under which names, with how many digits; and Markdown tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

ROW_LABELS = {
    "raw_model": "raw",
    "token_composite": "token composite",
    "pixel_composite": "pixel composite",
    "copy_matching_tokens": "copy where tokens match",
    "copy_source": "copy the source",
    "input_decoded": "input decoded",
}
# key: heading, format
IMAGE_COLUMNS = {
    "pictures": ("Pictures", "{:d}"),
    "mse": ("MSE", "{:.1f}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "psnr_pooled": ("PSNR dB, pooled", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "max_abs": ("Largest difference", "{:d}"),
    "exact": ("Exact pixels", "%"),
}
CLEAR_COLUMNS = {
    "pictures": ("Pictures", "{:d}"),
    "precision": ("CLEAR precision", "%"),
    "recall": ("CLEAR recall", "%"),
    "f1": ("CLEAR F1", "{:.4f}"),
    "f1_always_clear": ("F1 of always CLEAR", "{:.4f}"),
    "edit_iou": ("IoU of the edit", "{:.4f}"),
    "clear_rate_predicted": ("CLEAR rate, predicted", "%"),
    "clear_rate_true": ("CLEAR rate, true", "%"),
}
REGION_LABELS = {"": "whole picture", "_inside": "inside the edit", "_outside": "outside the edit"}


def format_number(value: float | None, form: str) -> str:
    """`None` is a dash and infinity ∞; a share in percent reads 100 % only where it is exactly 1, and 0 % where 0."""
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if form != "%":
        return form.format(value)
    text = f"{100 * value:.2f}"
    if text == "100.00" and value < 1:
        return "99.99 %"
    return "0.01 %" if text == "0.00" and value > 0 else f"{text} %"


def tables(rows: Mapping[str, Mapping[str, float | int | None]]) -> dict[str, list[list[str]]]:
    """Lay out rows of `aggregate_image_metrics` or `aggregate_clear_metrics`, or single pictures' metrics.

    Args:
        rows: row key or name → metrics. Keys of `ROW_LABELS` read as their label, others as they are.

    Returns:
        `dict`: region ("whole picture", "inside the edit", "outside the edit"; "" for CLEAR metrics) → table, a list
        of rows of text, the first the headings. Regions and columns that no row has are left out.
    """
    if any("edit_iou" in row for row in rows.values()):
        return {"": _table(rows, CLEAR_COLUMNS, "")}
    regions = [suffix for suffix in REGION_LABELS if any(f"mse{suffix}" in row for row in rows.values())]
    return {REGION_LABELS[suffix]: _table(rows, IMAGE_COLUMNS, suffix) for suffix in regions}


def _table(rows, columns, suffix: str) -> list[list[str]]:
    keys = {key: key if key == "pictures" else key + suffix for key in columns}
    shown = [key for key in columns if any(keys[key] in row for row in rows.values())]
    body = [
        [ROW_LABELS.get(name, name)] + [format_number(row.get(keys[key]), columns[key][1]) for key in shown]
        for name, row in rows.items()
    ]
    return [[""] + [columns[key][0] for key in shown]] + body


def markdown(rows: Mapping[str, Mapping[str, float | int | None]], title: str) -> str:
    """The `tables` of the rows as GitHub Markdown, each under a bold line with the title and the region."""
    return "\n".join(
        f"**{', '.join(filter(None, (title, region)))}**\n\n{markdown_table(head, body)}\n"
        for region, (head, *body) in tables(rows).items()
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub Markdown table: names to the left, numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
