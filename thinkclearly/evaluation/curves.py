"""Training curves from a Trainer's `log_history`, as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

PANELS = {
    "Loss": r"^(eval_)?(.+_)?loss$",
    "CLEAR rate": r"clear_(rate|ratio)",
    "Code accuracy": r"code_acc",
    "Gate AUC": r"gate_auc",
}
NOT_CURVES = ("train_loss",)  # the mean that Trainer logs once at the end
COLOURS = ("#3b82d6", "#e07b27", "#2a9d6f", "#a65fc4", "#c94f5f", "#8a8f2a")


def training_curves(log_history: Sequence[Mapping], ink: str = "#33363b") -> dict[str, str]:
    """Draw what the log has of loss, CLEAR rate (true and predicted), code accuracy and gate AUC over steps.

    Args:
        log_history: `Trainer.state.log_history`: dicts with `step` and numbers. Keys are sorted into panels by
            `PANELS`; `eval_…` keys are drawn dashed, in the colour of the training key of that name.
        ink (`str`, *optional*, defaults to `"#33363b"`): colour of axes and text; the background is transparent.

    Returns:
        `dict`: panel title → a stand-alone SVG document. Panels without a number are left out.
    """
    charts = {}
    for title, pattern in PANELS.items():
        series: dict[str, list[tuple[float, float]]] = {}
        for entry in log_history:
            for key, value in entry.items():
                if "step" in entry and key not in NOT_CURVES and re.search(pattern, key):
                    series.setdefault(key, []).append((entry["step"], float(value)))
        if series:
            charts[title] = _draw(title, series, ink)
    return charts


def _draw(title: str, series: Mapping[str, Sequence[tuple[float, float]]], ink: str) -> str:
    colours = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    with rc_context(colours | {"svg.hashsalt": title, "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        bases = sorted({name.removeprefix("eval_") for name in series})
        for name in sorted(series, key=lambda name: (name.removeprefix("eval_"), name.startswith("eval_"))):
            points, evaluated = sorted(series[name]), name.startswith("eval_")
            colour = COLOURS[bases.index(name.removeprefix("eval_")) % len(COLOURS)]
            style = {"linestyle": "--", "marker": "o", "markersize": 3.5} if evaluated else {"linestyle": "-"}
            if len(points) == 1:
                style["marker"] = "o"
            axes.plot(*zip(*points), color=colour, linewidth=1.6, label=name.replace("_", " "), **style)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("step")
        axes.grid(color=ink, alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
