"""Thoughts to look at: a page each, words and pictures in order, what changed outlined; and a page that lists them.

Reads a folder of thoughts as `data/thought_files.py` describes it. Knows nothing of models, or of who thought.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from thinkclearly.data.thought_files import mark, read_decoded
from thinkclearly.evaluation.report import LARGE, SMALL, embedded, page
from thinkclearly.files import write_text
from thinkclearly.images import load_image
from thinkclearly.reporting.tables import format_number

INDEX = "index.html"
STYLE = """
a { color: inherit; }
.thought { max-width: 620px; }
.thought figure { max-width: 512px; margin: 1.25rem 0; }
.thought p { white-space: pre-line; overflow-wrap: anywhere; }
.over { position: relative; }
.over svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.over path { fill: none; stroke: #fff; stroke-width: 4; vector-effect: non-scaling-stroke; }
.over path + path { stroke: #b3261e; stroke-width: 2; }
main:has(#changes:not(:checked)) .over svg { display: none; }
.list { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 1.25rem; }
.list a { text-decoration: none; display: block; }
.list .pair { margin: 0 0 .6rem; gap: .4rem; }
.list img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; border-radius: 5px; }
.list img.small { image-rendering: pixelated; }
"""


def write_pages(folder: str | Path, file: str) -> Path:
    """Writes `ID/index.html` for each thought of a folder, and `index.html`, which links them.

    Args:
        file: in the folder, lines of thoughts: `thoughts.jsonl`, or the original's `decoded_results.jsonl`, which
            does not say what changed.

    Returns:
        `Path`: of `index.html`. A thought's page has its pictures inside; the list shows their files.
    """
    folder = Path(folder)
    rows = read_decoded(folder / file)
    for row in rows:
        file, title = folder / str(row["sample_id"]) / INDEX, _title(row)
        if not file.exists():  # a folder that is made anew has none
            back = f'<p class="soft"><a href="../{INDEX}">All thoughts</a></p>'
            write_text(file, page(title, f"{back}<h1>{escape(title)}</h1>{_thought(folder, row)}", STYLE))
    heading = f"{len(rows)} thought{'' if len(rows) == 1 else 's'}"
    body = f'<h1>{heading}</h1><div class="list">{"".join(map(card, rows))}</div>'
    write_text(folder / INDEX, page(heading, body, STYLE))
    return folder / INDEX


def _title(row: Mapping) -> str:
    return row.get("prompt") or re.split("<image_|<invalid_image_", row["text"])[0].strip() or "Without words"


def _thought(folder: Path, row: Mapping) -> str:
    """Words and pictures in order. Of the text, what was answered, where the line says so."""
    notes = [f"{name} {row[name]}" for name in ("mode", "seed", "ended") if name in row]
    head = f'<p class="soft">{escape(", ".join(notes))}</p>' if notes else ""
    if any(picture and picture["changed"] is not None for picture in row.get("pictures", [])):
        head += '<p><label><input type="checkbox" id="changes" checked> Outline what changed</label></p>'
    parts, marks = [head], {mark(k, path is not None): k for k, path in enumerate(row["image_paths"])}
    for piece in re.split(r"(<(?:invalid_)?image_\d+>)", row.get("answer", row["text"])):
        if piece not in marks:  # the model may say what looks like a mark
            parts.append(f"<p>{escape(piece.strip())}</p>" if piece.strip() else "")
        elif row["image_paths"][marks[piece]] is None:
            parts.append('<p class="soft">A picture that was not finished.</p>')
        else:
            parts.append(_figure(folder, row, marks[piece]))
    return f'<div class="thought">{"".join(parts)}</div>'


def _figure(folder: Path, row: Mapping, k: int) -> str:
    label = f"Picture {k + 1}"
    known = (row["pictures"][k] if "pictures" in row else None) or {}
    image, outline = embedded(label, load_image(folder / row["image_paths"][k]), largest=LARGE), ""
    if known.get("changed") is not None:
        mask = np.zeros((row["grid"], row["grid"]), bool)
        mask.flat[known["changed"]] = True
        path = f'<path d="{outline_path(mask)}"/>'
        box = f'viewBox="0 0 {len(mask)} {len(mask)}" preserveAspectRatio="none" aria-hidden="true"'
        outline = f"<svg {box}>{path}{path}</svg>"  # light under dark, to stand out on any picture
    facts = _facts(known, row.get("grid"))
    detail = f"<span>{escape(', '.join(facts))}</span>" if facts else ""
    return f'<figure><div class="over">{image}{outline}</div><figcaption>{label}{detail}</figcaption></figure>'


def _facts(known: Mapping, grid: int | None) -> list[str]:
    facts = []
    for name, words in (("changed", "changed"), ("clear", "copied byte for byte")):
        if known.get(name) is not None:
            facts.append(f"{format_number(len(known[name]) / grid**2, '%')} {words}")
    return facts + ([f"{known['passes']} passes"] if known.get("passes") else [])


def outline_path(mask: np.ndarray) -> str:
    """The border of a bool grid (rows, columns) as an SVG path whose unit is a cell."""
    padded = np.pad(mask, 1)
    level = (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero()
    upright = (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero()
    return "".join([f"M{x} {y}h1" for y, x in zip(*level)] + [f"M{x} {y}v1" for y, x in zip(*upright)])


def card(row: Mapping, base: str = "") -> str:
    """A thought's prompt over its first and last picture, linked to its page, in the folder `base` seen from here."""
    title = escape(_title(row))
    shown = _ends([path for path in row["image_paths"] if path is not None])
    small = ' class="small"' if row.get("size", LARGE) <= SMALL else ""
    images = "".join(f'<img{small} src="{base}{escape(path)}" alt="" loading="lazy">' for path in shown)
    link = f"{base}{row['sample_id']}/{INDEX}"
    return f'<a class="edit" href="{link}"><div class="pair">{images}</div><h3>{title}</h3></a>'


def _ends(paths: Sequence[str]) -> list[str]:
    """The first and the last one."""
    return list(dict.fromkeys([*paths[:1], *paths[-1:]]))
