"""A benchmark's results as text and for a model card: ours, copy-the-source and the published rows in one table."""

from __future__ import annotations

import math

from huggingface_hub import EvalResult

from thinkclearly.evaluation.benchmarks import geneval, metrics, paircomp, shapes_pairs
from thinkclearly.evaluation.benchmarks.metrics import TARGET
from thinkclearly.evaluation.benchmarks.published import PUBLISHED, SOURCES
from thinkclearly.reporting.tables import ROW_LABELS, format_number, markdown_table

LABELS = ROW_LABELS | {
    TARGET: "the target itself",
    "model": "this model",
    "first": "this model, a thought's first picture",
    "last": "this model, a thought's last picture",
    "partner": "the true picture of the pair's other scene",
    "tokenizer": "the true picture through the tokenizer",
}
NAMES = {
    "magicbrush": "MagicBrush",
    "pie-bench": "PIE-Bench",
    "paircomp": "PairComp",
    "geneval": "GenEval",
    "shapes-pairs": "Pairs of shapes",
}
DATASETS = {"magicbrush": "osunlp/MagicBrush"}
COLUMNS = metrics.COLUMNS | {
    "paircomp": paircomp.COLUMNS,
    "geneval": geneval.COLUMNS,
    "shapes-pairs": shapes_pairs.COLUMNS,
}
JUDGES = ("scorer", "detector", "clip", "dino")


def report(results: dict) -> str:
    """Markdown: for each setting one table of our rows, then the published ones with their sources below.

    Args:
        results: what `run.run_benchmark` and `drawn.run_drawn` return.
    """
    run = results["run"]
    name = run["benchmark"]
    looked = ", ".join(f"{kind} {run[kind]}" for kind in JUDGES if run.get(kind, "none") != "none")
    parts = [f"# {NAMES[name]}, {run['split']}", f"Model {run['model']}{looked and '; ' + looked}."]
    parts += results.get("notes", [])
    if run["limit"] is not None:
        parts.append(f"**A part only** (limit {run['limit']}): not to be compared with whole runs.")
    if results["left_out"]:
        parts.append(f"**{results['left_out']} items are left out**: they could not be read or edited.")
    cited: dict[str, None] = {}
    for setting, rows in results["results"].items():
        published = PUBLISHED.get(name, {}).get(setting, [])
        shown = [key for key in COLUMNS[name] if any(_number(row.get(key)) is not None for row in rows.values())]
        head = ["", "Pictures"] + [COLUMNS[name][key][0] for key in shown]
        ours = [[LABELS.get(key, key), str(row["pictures"])] + _cells(row, shown, name) for key, row in rows.items()]
        theirs = [[f"{method} [{source}]", ""] + _cells(values, shown, name) for method, source, values in published]
        cited |= dict.fromkeys(source for _, source, _ in published)
        parts += [f"## {setting.capitalize()}", markdown_table(head, ours + theirs)]
    if cited:
        parts.append("Rows with a source are not our runs:")
        parts.append("\n".join(f"- [{key}] {SOURCES[key]}" for key in cited))
    return "\n\n".join(parts) + "\n"


def eval_results(results: dict) -> list[EvalResult]:
    """The finite numbers for a model card: each method's, copy-the-source among them, in each setting and column."""
    run = results["run"]
    name = run["benchmark"]
    return [
        EvalResult(
            task_type="image-to-image" if name in metrics.COLUMNS else "text-to-image",
            dataset_type=DATASETS.get(name, NAMES[name]),
            dataset_name=NAMES[name],
            dataset_config=setting,
            dataset_split=run["split"],
            metric_type=column,
            metric_name=f"{heading.rstrip(' ↑↓')}, {LABELS[row]}",
            metric_value=value,
        )
        for setting, rows in results["results"].items()
        for row in rows
        if row != TARGET
        for column, (heading, _) in COLUMNS[name].items()
        if (value := _number(rows[row].get(column))) is not None and math.isfinite(value)
    ]


def _number(value) -> float | None:
    return None if value is None else float(value)


def _cells(row: dict, columns: list[str], name: str) -> list[str]:
    return [format_number(_number(row.get(column)), COLUMNS[name][column][1]) for column in columns]
