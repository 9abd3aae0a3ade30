"""One HTML file to look at: a few edits and one table first; all numbers, curves and pictures folded up below.

Nothing outside the file is needed: pictures and curves are embedded, there is no script and no network.
"""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from thinkclearly.evaluation.metrics import image_metrics
from thinkclearly.files import write_text
from thinkclearly.reporting.curves import calibration_curve, training_curves
from thinkclearly.reporting.pictures import HEAT_COLOURS, heat_map, mask_image, red_overlay
from thinkclearly.reporting.tables import format_number, tables

DARK_INK = "#c3c8cf"
THUMBNAIL, LARGE = 512, 1024  # pixels; larger pictures are shrunk to this among all edits and among the picks
SMALL = 128  # pixels; smaller pictures are shown in hard-edged blocks
ABOUT_NUMBERS = (
    '<p class="soft">MSE in squared levels of 255, averaged over each region’s own pixels. One exact copy makes the '
    "mean PSNR infinite; the pooled one takes all pixels as one picture. “Copy the source” edits nothing: numbers "
    "against the source flatter it, so read them beside those against the target or the edit itself. What “copy the "
    "source” is to pictures, “always CLEAR” is to F1.</p>"
)

STYLE = """
:root { color-scheme: light dark; --ink: #1d2024; --soft: #5b626b; --paper: #fbfbfa; --card: #fff; --line: #e3e4e6;
  --accent: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #a0a7b0; --paper: #14161a; --card: #1d2025;
  --line: #32363d; --accent: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0 0 1.25rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 75ch; }
.lead { font-size: 1.1rem; }
.soft { color: var(--soft); font-size: .875rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .25rem 0; }
table { font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .75rem 0 .25rem; }
th, td { padding: .4rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
.curves img { width: 100%; height: auto; display: block; }
.edit, .curves picture { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.curves picture { display: block; padding: .5rem; }
.edit { padding: 1.1rem; margin: 0 0 1.25rem; }
.picks { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 1.25rem; }
.picks .edit { margin: 0; }
.rank { margin: 0; color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .06em;
  text-transform: uppercase; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .9rem; margin-top: .9rem; }
.pair.tall { grid-template-columns: 1fr; }
.pair figure { max-width: none; }
details { border-top: 1px solid var(--line); }
details:first-of-type { margin-top: 3rem; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 600; padding: .9rem 0; }
details[open] { padding-bottom: 1.5rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 140px), 1fr)); gap: .9rem;
  margin-top: .9rem; }
figure { margin: 0; min-width: 0; max-width: 400px; }
figure img { width: 100%; height: auto; display: block; border-radius: 5px; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: .82rem; line-height: 1.35; margin-top: .35rem; }
figcaption span { display: block; color: var(--soft); }
.scale { display: flex; align-items: center; gap: .2rem .6rem; flex-wrap: wrap; max-width: none; }
.scale i { width: 200px; height: .8rem; border-radius: 3px; }
@media print { body { background: #fff; } .edit { break-inside: avoid; } }
"""


def write_report(
    directory: str | os.PathLike,
    title: str,
    *,
    lead: str = "",
    picks: Mapping[str, Mapping[str, Mapping]] | None = None,
    results: Sequence[Sequence[str]] = (),
    remarks: str = "",
    rows: Sequence[Mapping] = (),
    metrics: Mapping[str, Mapping[str, Mapping]] | None = None,
    curves: Sequence[Mapping] = (),
    gate: tuple[np.ndarray, np.ndarray] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html`: self-contained, readable in light and dark, from phone to wide screen.

    The page opens with the pictures of `picks`, then comes the table of `results`. All else is folded up below.

    Args:
        directory (`str` or `os.PathLike`): folder for the file; made if missing.
        title (`str`): heading of the page.
        lead (`str`, *optional*): one sentence over the pictures.
        picks (*optional*): heading → name ("Best") → an edit as in `rows`, shown as source and composite at up to
            `LARGE` pixels.
        results (*optional*): a table as text; the first line holds the headings.
        remarks (`str`, *optional*): what the table says, in words.
        rows (*optional*): one dict an edit, in the order of the page. `source` (`PIL.Image.Image`) and `instruction`
            (`str`) are needed; `raw`, `composite` and `target` (pictures) and `mask` (bool, (H, W) of the source's
            pixels or a grid of patches that covers the whole source; True where edited) are shown where present, and
            so is a line of text `note`. Heat maps of raw and composite against the source are drawn where sizes agree.
        metrics (*optional*): heading → row → what `aggregate_image_metrics` or `aggregate_clear_metrics` gives. Known
            row keys (`tables.ROW_LABELS`) get a readable name, others stand as they are.
        curves (*optional*): a Trainer's `log_history`. See `training_curves`.
        gate (*optional*): calibrated log-odds float (M,) and truth bool (M,), for the calibration curve.
        notes (`Mapping[str, str]`, *optional*): settings, machine, date…

    Returns:
        `Path`: of the file. It is written beside itself and renamed, so a reader never sees half a report.

    Raises:
        ValueError: a row without `source` or `instruction`, or a mask that is not bool.
    """
    directory = Path(directory)
    for number, row in enumerate(rows, 1):
        missing = {"source", "instruction"} - set(row)
        if missing:
            raise ValueError(f"Row {number} of the report has no {' and no '.join(sorted(missing))}.")
    body = [f"<h1>{escape(title)}</h1>"]
    if lead:
        body.append(f'<p class="lead">{escape(lead)}</p>')
    for heading, edits in (picks or {}).items():
        cards = "".join(_pick(name, edit) for name, edit in edits.items())
        body.append(f'<h2>{escape(heading)}</h2><div class="picks">{cards}</div>')
    if results:
        body.append("<h2>Results</h2>" + table(results) + (f"<p>{escape(remarks)}</p>" if remarks else ""))
    tables_ = "".join(_tables(name, table) for name, table in (metrics or {}).items())
    body += [
        _folded("All numbers", tables_ and tables_ + ABOUT_NUMBERS),
        _folded("Curves", _curves(curves, gate)),
        _folded(f"{len(rows)} edits in full", rows and _scale() + "".join(_edit(row) for row in rows)),
        _folded("How it was made", _notes(notes or {})),
    ]
    path = directory / "report.html"
    write_text(path, page(title, "\n".join(filter(None, body))))
    return path


def page(title: str, body: str, style: str = "") -> str:
    """A whole HTML file in the colours and type of the report; `style` is CSS of its own."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>\n"
        f"{body}\n</main></body></html>\n"
    )


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def _pick(name: str, edit: Mapping) -> str:
    """A card with the source before the composite; photographs stand one above the other."""
    figures = _figure("Before", edit["source"], largest=LARGE) + _figure("After", edit["composite"], largest=LARGE)
    shape = "pair" if max(edit["source"].size) <= SMALL else "pair tall"
    return (
        f'<article class="edit"><p class="rank">{escape(name)}</p><h3>{escape(str(edit["instruction"]))}</h3>'
        f'<div class="{shape}">{figures}</div>{_note(edit)}</article>'
    )


def _note(row: Mapping) -> str:
    return f'<p class="soft">{escape(str(row["note"]))}</p>' if row.get("note") else ""


def _notes(notes: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in notes.items())
    return f"<dl>{items}</dl>" if items else ""


def _tables(heading: str, rows: Mapping[str, Mapping]) -> str:
    return "".join(table(lines, ", ".join(filter(None, (heading, region)))) for region, lines in tables(rows).items())


def table(lines: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of text, headings first, names to the left."""
    (_, *heads), *body = lines
    columns = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in body
    )
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr><td></td>{columns}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _curves(curves: Sequence[Mapping], gate: tuple[np.ndarray, np.ndarray] | None) -> str:
    light, dark = training_curves(curves), training_curves(curves, ink=DARK_INK)
    if gate is not None and len(gate[0]):
        name = "Calibration of the gate"
        light, dark = light | {name: calibration_curve(*gate)}, dark | {name: calibration_curve(*gate, ink=DARK_INK)}
    return "".join(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_svg_uri(dark[title])}">'
        f'<img src="{_svg_uri(svg)}" alt="{escape(title)}"></picture>'
        for title, svg in light.items()
    )


def _scale() -> str:
    stops = ", ".join(f"rgb{tuple(int(c) for c in colour)}" for colour in HEAT_COLOURS[1::9])
    return (
        '<p class="soft scale">Heat maps, largest difference of the channels: black is bit-identical, 1 level '
        f'<i style="background: linear-gradient(90deg, {stops})"></i> 64 of 255 levels and more</p>'
    )


def _edit(row: Mapping) -> str:
    source = row["source"]
    figures = [_figure("Source", source)]
    if row.get("mask") is not None:
        mask = row["mask"]
        if mask.shape != (source.height, source.width):
            mask = np.asarray(mask_image(mask, source.size)) > 0
        figures.append(_figure("Edited area", red_overlay(source, mask), format_number(mask.mean().item(), "%")))
    results = {label: row.get(key) for key, label in (("raw", "Raw"), ("composite", "Composite"))}
    figures += [_figure(label, picture) for label, picture in results.items() if picture is not None]
    if row.get("target") is not None:
        figures.append(_figure("Target", row["target"]))
    for label, picture in results.items():
        if picture is not None and picture.size == source.size:
            numbers = image_metrics(picture, source)
            exact = format_number(numbers["exact"], "%")
            detail = f"{format_number(numbers['psnr'], '{:.2f}')} dB, {exact} exact"
            figures.append(_figure(f"{label} − source", heat_map(picture, source), detail, exact=True))
    heading = f"<h3>{escape(str(row['instruction']))}</h3>"
    return f'<article class="edit">{heading}{_note(row)}<div class="strip">{"".join(figures)}</div></article>'


def _figure(label: str, picture: Image.Image, detail: str = "", exact: bool = False, largest: int = THUMBNAIL) -> str:
    """A picture with its caption; heat maps are kept lossless (`exact`), photographs may be compressed."""
    detail = f"<span>{escape(detail)}</span>" if detail else ""
    image = embedded(label, picture, exact, largest)
    return f"<figure>{image}<figcaption>{escape(label)}{detail}</figcaption></figure>"


def embedded(label: str, picture: Image.Image, exact: bool = False, largest: int = THUMBNAIL) -> str:
    """A picture inside the page, shrunk to `largest` pixels; small ones and `exact` ones lossless."""
    small = ' class="small"' if max(picture.size) <= SMALL else ""
    picture = picture.convert("RGB")
    picture.thumbnail((largest, largest))
    buffer = io.BytesIO()
    lossless = exact or bool(small)
    picture.save(buffer, "WEBP", lossless=lossless, quality=80 if lossless else 88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img{small} src="data:image/webp;base64,{data}" alt="{escape(label)}" width="{picture.width}" '
        f'height="{picture.height}" loading="lazy">'
    )


def _svg_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def machine() -> str:
    """The machine in words, for reports."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
