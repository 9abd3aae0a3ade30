"""Curves as SVG: training from a Trainer's `log_history`, and how honest the gate is."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
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


def calibration_curve(log_odds: np.ndarray, clear: np.ndarray, ink: str = "#33363b", bins: int = 10) -> str:
    """Draw how often patches were CLEAR against how probable the gate called it, in bins of equal width.

    Args:
        log_odds: float (M,), calibrated log-odds of copying.
        clear: bool (M,), whether CLEAR was true.
        ink (`str`, *optional*): as in `training_curves`.

    Returns:
        `str`: a stand-alone SVG document. Below the curve, on a logarithmic scale, how many patches each bin has.
    """
    probability = 1 / (1 + np.exp(-np.clip(log_odds, -60, 60)))
    which = np.minimum((probability * bins).astype(int), bins - 1)
    counts = np.bincount(which, minlength=bins)
    filled = counts > 0
    mean, share = (np.bincount(which, v, bins)[filled] / counts[filled] for v in (probability, clear.astype(float)))
    with _figure("calibration", ink) as (figure, buffer):
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot((0, 1), (0, 1), color=ink, alpha=0.4, linewidth=1, label="honest")
        axes.plot(mean, share, color=COLOURS[0], marker="o", markersize=3.5, linewidth=1.6, label="gate")
        axes.set_ylabel("were CLEAR")
        below.bar((np.arange(bins) + 0.5) / bins, counts, 0.9 / bins, color=COLOURS[0], log=True)
        below.set_ylabel("patches")
        below.set_xlabel("probability of CLEAR")
        _finish(axes, "Calibration of the gate", ink)
        below.spines[["top", "right"]].set_visible(False)
    return buffer.getvalue()


@contextmanager
def _figure(salt: str, ink: str) -> Iterator[tuple[Figure, io.StringIO]]:
    """A figure in the colours of the page, written into the buffer when done."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    buffer = io.StringIO()
    with rc_context(dict.fromkeys(names, ink) | {"svg.hashsalt": salt, "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        yield figure, buffer
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})


def _finish(axes, title: str, ink: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(color=ink, alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _draw(title: str, series: Mapping[str, Sequence[tuple[float, float]]], ink: str) -> str:
    with _figure(title, ink) as (figure, buffer):
        axes = figure.add_subplot()
        bases = sorted({name.removeprefix("eval_") for name in series})
        for name in sorted(series, key=lambda name: (name.removeprefix("eval_"), name.startswith("eval_"))):
            points, evaluated = sorted(series[name]), name.startswith("eval_")
            colour = COLOURS[bases.index(name.removeprefix("eval_")) % len(COLOURS)]
            style = {"linestyle": "--", "marker": "o", "markersize": 3.5} if evaluated else {"linestyle": "-"}
            if len(points) == 1:
                style["marker"] = "o"
            axes.plot(*zip(*points), color=colour, linewidth=1.6, label=name.replace("_", " "), **style)
        axes.set_xlabel("step")
        _finish(axes, title, ink)
    return buffer.getvalue()
