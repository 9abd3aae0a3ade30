"""From measured points to committed results: `results.json`, `results.md`, and the plots of docs/stability.md."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.stability.offline import cleaning, label_noise, pointer_sum
from benchmarks.stability.pictures import draw_gates
from benchmarks.stability.runs import BIASES, GUIDANCE, ORIGINAL, OUTPUT, SEEDS, WEIGHTS, path, points, variant
from thinkclearly.evaluation.report import machine
from thinkclearly.files import write_json, write_text
from thinkclearly.reporting.tables import format_number, markdown_table

HERE, IMAGES = Path(__file__).parent, Path("docs/images")
COLUMNS = {
    "clear_f1": ("F1", "{:.3f}"),
    "clear_precision": ("precision", "{:.3f}"),
    "clear_recall": ("recall", "{:.3f}"),
    "mask_iou": ("edit IoU", "{:.3f}"),
    "gate_auc": ("AUC", "{:.4f}"),
    "gate_ece": ("ECE", "{:.3f}"),
    "composite_done": ("done", "{:.1%}"),
    "raw_done": ("raw done", "{:.1%}"),
    "composite_mse_inside": ("MSE inside", "{:.0f}"),
    "composite_mse_outside": ("MSE outside", "{:.0f}"),
    "composite_exact_outside": ("exact outside", "{:.1%}"),
    "false_clear": ("false CLEAR", "{:.2%}"),
    "holed": ("holed edits", "{:.1%}"),
}
HEADS = [head for head, _ in COLUMNS.values()]
BASELINES = {
    "composite": "ours",
    "raw": "raw decode",
    "matching": "copy where tokens match",
    "oracle": "true mask",
    "source": "copy the source",
}
SHOWN = (3, 8, 11, 17)  # held-out edits of the picture
OURS, JOINT, ORIGINALS = "#3b82d6", "#e07b27", "#c94f5f"


def collect() -> list[dict]:
    """One row a point: means over its parts weighted by their edits, and the spread over seeds of `whole` points."""
    rows = []
    for point in points():
        files = [path(point, *part) for part in point.parts()]
        found = [json.loads(file.read_text()) for file in files if file.is_file()]
        if len(found) < len(files):
            continue
        numbers = [part["row"] for part in found]
        mean = {name: statistics.fmean(row[name] for row in numbers) for name in numbers[0]}
        spread = {name: statistics.stdev(row[name] for row in numbers) for name in COLUMNS} if len(found) > 2 else {}
        rows.append({**asdict(point), "edits": sum(part["edits"] for part in found), "mean": mean, "spread": spread})
    return rows


def write() -> None:
    rows = collect()
    extra = {
        "labels": label_noise(OUTPUT),
        "cleaning": cleaning(OUTPUT),
        "pointer_sum": {str(seed): pointer_sum(OUTPUT, seed) for seed in SEEDS},
    }
    write_json(HERE / "results.json", {"machine": machine(), "points": rows, **extra})
    write_text(HERE / "results.md", markdown(rows, extra))
    draw(rows)
    draw_gates(OUTPUT, IMAGES / "stability_gates.png", SHOWN)


def find(rows: list[dict], name: str, settings: dict) -> dict | None:
    return next((r for r in rows if r["variant"] == name and r["settings"] == settings), None)


def label(row: dict) -> str:
    settings = dict(row["settings"])
    words = [row["variant"]]
    if all(settings.get(name) == value for name, value in ORIGINAL.items() if name != "cfg_weight"):
        words.append("joint guidance")
        settings = {k: v for k, v in settings.items() if k not in ORIGINAL or k == "cfg_weight"}
    return ", ".join(words + [f"{name} {value}" for name, value in settings.items()])


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cells = [format_number(row["mean"][name], form) for name, (_, form) in COLUMNS.items()]
        unchanged = 1 - row["mean"]["changed"]
        lines.append([label(row), str(row["edits"]), f"{2 * unchanged / (1 + unchanged):.3f}", *cells])
    return markdown_table(["", "edits", "F1 of always CLEAR", *HEADS], lines)


def markdown(rows: list[dict], extra: dict) -> str:
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    parts = [f"# Stability: all numbers\n\nWritten by `python -m benchmarks.stability` on {machine()}."]
    main = groups["main"][0]
    names = ("done", "mse_inside", "mse_outside", "exact_outside")
    lines = []
    forms = ("{:.1%}", "{:.0f}", "{:.0f}", "{:.1%}")
    for recipe_row in groups["main"]:
        for key, words in BASELINES.items():
            cells = [format_number(recipe_row["mean"][f"{key}_{n}"], form) for n, form in zip(names, forms)]
            if recipe_row is main or recipe_row["variant"] == "original":
                lines.append([f"{label(recipe_row)}: {words}", *cells])
    head = ["", "edit done", "MSE inside", "MSE outside", "exact outside"]
    parts += ["## Against the baselines", markdown_table(head, lines)]
    parts += [f"## {name.capitalize()}\n\n{table(found)}" for name, found in groups.items()]
    lines = [[label(r), *(f"{r['spread'][c]:.4f}" for c in COLUMNS)] for r in groups["main"] if r["spread"]]
    parts += ["## Standard deviation over the seeds", markdown_table(["", *HEADS], lines)]
    lines = [
        [k, ", ".join(f"{x:.3f}" for x in (v if isinstance(v, list) else [v]))] for k, v in extra["labels"].items()
    ]
    parts += ["## How true token equality is", markdown_table(["", ""], lines)]
    lines = [
        [r["rule"], f"{r['f1']:.4f}", f"{r['iou']:.4f}", f"{r['false_clear']:.2%}", f"{r['holed']:.1%}"]
        for r in extra["cleaning"]
    ]
    parts += ["## Mask cleaning", markdown_table(["", "F1", "edit IoU", "false CLEAR", "holed edits"], lines)]
    lines = [
        [f"{name}, seed {seed}", *(f"{r[key]:.4f}" for key in ("auc", "f1", "ece_uncalibrated", "ece"))]
        for seed, both in extra["pointer_sum"].items()
        for name, r in both.items()
    ]
    head = ["", "AUC", "F1 calibrated", "ECE before", "ECE calibrated"]
    parts += ["## The source code's own probability (teacher-forced)", markdown_table(head, lines)]
    return "\n\n".join(parts) + "\n"


def draw(rows: list[dict]) -> None:
    """F1 and edit success over each of the three knobs, for the recipe's gate and for joint guidance."""
    panels = {
        "clear_weight (training)": [
            ("factorised, calibrated", OURS, [(w, find(rows, variant(w), {})) for w in WEIGHTS]),
            ("joint guidance", JOINT, [(w, find(rows, variant(w), ORIGINAL)) for w in WEIGHTS]),
        ],
        "cfg_weight": [
            ("factorised, calibrated", OURS, [(g, find(rows, "default", {"cfg_weight": g})) for g in GUIDANCE]),
            ("joint guidance", JOINT, [(g, find(rows, "default", {**ORIGINAL, "cfg_weight": g})) for g in GUIDANCE]),
            (
                "original recipe",
                ORIGINALS,
                [(g, find(rows, "original", {**ORIGINAL, "cfg_weight": g})) for g in GUIDANCE],
            ),
        ],
        "clear_bias": [
            (
                "factorised, calibrated",
                OURS,
                [(0, find(rows, "default", {}))] + [(b, find(rows, "default", {"clear_bias": b})) for b in BIASES],
            ),
            (
                "original recipe",
                ORIGINALS,
                [(0, find(rows, "original", ORIGINAL))]
                + [(b, find(rows, "original", {**ORIGINAL, "clear_bias": b})) for b in BIASES],
            ),
        ],
    }
    measures = {"clear_f1": "CLEAR F1", "composite_done": "edit done"}
    for ink, name in (("#33363b", "stability.svg"), ("#c3c8cf", "stability_dark.svg")):
        keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        with rc_context(dict.fromkeys(keys, ink) | {"svg.hashsalt": name, "font.size": 9}):
            figure = Figure(figsize=(9.6, 4.8), layout="constrained")
            grid = figure.subplots(2, 3, sharey="row", sharex="col")
            for axes_row, (measure, words) in zip(grid, measures.items()):
                for axes, (title, lines) in zip(axes_row, panels.items()):
                    for words_line, colour, found in lines:
                        there = sorted((x, row["mean"][measure]) for x, row in found if row is not None)
                        if there:
                            axes.plot(*zip(*there), color=colour, marker="o", markersize=3.5, label=words_line)
                    if "weight (" in title:
                        axes.set_xscale("log")
                    axes.grid(color=ink, alpha=0.15, linewidth=0.6)
                    axes.spines[["top", "right"]].set_visible(False)
                    if measure == "composite_done":
                        axes.set_xlabel(title)
                axes_row[0].set_ylabel(words)
            grid[0][1].legend(frameon=False, fontsize=8)
            IMAGES.mkdir(parents=True, exist_ok=True)
            figure.savefig(IMAGES / name, transparent=True, metadata={"Date": None})
