"""The picture of docs/stability.md: where two models call a patch CLEAR, beside where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.stability.runs import ORIGINAL, SEEDS
from benchmarks.stability.train import gates, recipe
from thinkclearly.data import sources
from thinkclearly.reporting.pictures import sheet

SIDE = 160


def probabilities(log_odds: np.ndarray) -> Image.Image:
    """White where CLEAR is certain, black where painting is; (g, g) to a square picture."""
    grey = np.uint8(255 / (1 + np.exp(-np.clip(log_odds, -30, 30))) + 0.5)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB")


def draw_gates(output: Path, path: Path, numbers: tuple[int, ...]) -> None:
    """One row an edit: source, target, truth, the original's recipe, the default."""
    options = recipe(output)[2]
    rows = sources.shapes(max(numbers) + 1, size=options.shapes_size, seed=options.split_seed + 1, split="test")
    ours = np.load(gates(output, "default", SEEDS[0], {}))
    theirs = np.load(gates(output, "original", SEEDS[0], ORIGINAL))
    lines = []
    for number in numbers:
        example = sources.read_example(rows[number])
        big = [p.resize((SIDE, SIDE), Image.Resampling.NEAREST) for p in (example.source, example.target)]
        truth = probabilities(np.where(ours["clear"][number], 30.0, -30.0))
        lines.append(
            [
                (big[0], example.instruction),
                (big[1], "target"),
                (truth, "unchanged"),
                (probabilities(theirs["gate"][number]), "original recipe"),
                (probabilities(ours["gate"][number]), "default"),
            ]
        )
    sheet(lines).save(path, optimize=True)
