"""A look at prepared data before it is trained on: how much is CLEAR, whether the labels are true, and examples.

Writes `statistics.json`, `statistics.png` and `examples.png`. Knows nothing of prompts or training.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from thinkclearly.data.prepare import unchanged
from thinkclearly.files import write_json
from thinkclearly.images import Letterbox, load_image, to_image
from thinkclearly.instructions import CLEAR, InstructionVocabulary
from thinkclearly.models.load import Checkpoint

logger = logging.getLogger(__name__)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MEANING = {
    "clear_ratio": "share of a record's patches that are CLEAR: by the labels in use, and as each rule would have it",
    "instruction_ratio": "the same of every other instruction, by the labels in use",
    "mask_coverage": "share of a record's patches that the human mask marks as edited; counts in 10 bins from 0 to 1",
    "outside_mask.tokens_differ": "of the patches outside the mask: the target's code is not the source's",
    "outside_mask.tokens_differ_same_pixels": "the same, though no channel differs by more than pixel_tolerance",
    "outside_mask.tokens_differ_identical_pixels": "the same, though the pixels are identical: the encoder did it",
    "agreement_with_mask": "how well differing codes, or pixels, find the patches that the mask marks as edited",
}


def inspect_dataset(
    dataset: Dataset,
    checkpoint: Checkpoint,
    directory: str | Path,
    examples: int = 8,
    seed: int = 0,
    pixel_tolerance: int = 16,
    instructions: Sequence[str] = (CLEAR,),
) -> dict:
    """Measures a labelled data set, and draws plots and a sheet of random examples.

    Args:
        dataset: as `prepare_dataset` returns it; of one read from JSONL only the labels in use can be measured.
        directory: where `statistics.json`, `statistics.png` and `examples.png` are written.
        examples: rows of the sheet: source, target as its codes decode, and the painted patches in red, those of other
            instructions than CLEAR in blue.
        seed: of the choice of examples.
        pixel_tolerance: of 255, for the rule `pixels` and wherever pixels count as the same.
        instructions: names of the labels' instruction tokens.

    Returns:
        `dict`: the content of `statistics.json`; `MEANING` explains its entries. Shares of nothing are None.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = InstructionVocabulary(checkpoint.token_model.codebook_size, tuple(instructions))
    rows, counts = _measure(dataset, vocabulary, pixel_tolerance)
    statistics = {
        "records": len(dataset),
        "patches": checkpoint.processor.num_image_tokens,
        "pixel_tolerance": pixel_tolerance,
        "clear_ratio": {rule: _summary(values) for rule, values in rows.items() if rule in ("labels", *RULES)},
    }
    others = [name for name in vocabulary.names if name != CLEAR]
    if others:
        statistics["instruction_ratio"] = {name: _summary(rows[f"labels {name}"]) for name in others}
    if counts:
        outside = counts["outside"]
        statistics["mask_coverage"] = _summary(rows["coverage"]) | {
            "records": len(rows["coverage"]),
            "histogram": np.histogram(rows["coverage"], bins=10, range=(0, 1))[0].tolist(),
        }
        statistics["outside_mask"] = {name: _share(counts[name], outside) for name in OUTSIDE}
        statistics["agreement_with_mask"] = {rule: _agreement(counts, rule) for rule in ("tokens", "pixels")}
    statistics["meaning"] = MEANING
    write_json(directory / "statistics.json", statistics)
    _plot(rows, statistics, directory / "statistics.png")
    _draw_examples(dataset, checkpoint, vocabulary, examples, seed, directory / "examples.png")
    logger.info(
        "%d records, %.0f%% CLEAR; statistics and examples in %s",
        len(dataset),
        100 * statistics["clear_ratio"]["labels"]["mean"],
        directory,
    )
    return statistics


RULES = ("tokens", "pixels", "mask")
OUTSIDE = ("tokens_differ", "tokens_differ_same_pixels", "tokens_differ_identical_pixels")


def _measure(
    dataset: Dataset, vocabulary: InstructionVocabulary, tolerance: int
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Numbers of each record (the masked ones only, where a mask is needed), and counts of patches in all."""
    wanted = ("output_tokens", "input_tokens", "target_tokens", "pixel_difference", "mask_tokens")
    table = dataset.select_columns([name for name in wanted if name in dataset.column_names]).with_format("numpy")
    prepared = {"target_tokens", "pixel_difference"} <= set(table.column_names)
    rows: dict[str, list[np.ndarray]] = {}
    counts: dict[str, int] = {}

    def add(**values: np.ndarray) -> None:
        for name, value in values.items():
            rows.setdefault(name, []).append(value)

    with tqdm(total=len(table), desc="inspect", unit="record", disable=None) as bar:
        for batch in table.iter(2048):
            bar.update(len(batch["output_tokens"]))
            labels = torch.from_numpy(batch["output_tokens"])
            for name in dict.fromkeys((CLEAR, *vocabulary.names)):
                share = vocabulary.says(labels, name).numpy().mean(-1)
                add(**{"labels" if name == CLEAR else f"labels {name}": share})
            if not prepared:
                continue
            same = {rule: unchanged(batch, rule, tolerance) for rule in ("tokens", "pixels")}
            add(**{rule: value.mean(-1) for rule, value in same.items()})
            masked = np.array([mask is not None for mask in batch["mask_tokens"]])
            if not masked.any():
                continue
            mask = np.stack([m for m in batch["mask_tokens"] if m is not None]).astype(bool)
            differ, moved = ~same["tokens"][masked], ~same["pixels"][masked]
            flips = differ & ~moved & ~mask
            add(mask=(~mask).mean(-1), coverage=mask.mean(-1), flips=flips.sum(-1) / np.maximum(1, (~mask).sum(-1)))
            found = {
                "outside": ~mask,
                "tokens_differ": differ & ~mask,
                "tokens_differ_same_pixels": flips,
                "tokens_differ_identical_pixels": differ & ~mask & (batch["pixel_difference"][masked] == 0),
            }
            for rule, edited in (("tokens", differ), ("pixels", moved)):
                found |= {
                    f"{rule}_both": edited & mask,
                    f"{rule}_only": edited & ~mask,
                    f"{rule}_missed": ~edited & mask,
                    f"{rule}_neither": ~edited & ~mask,
                }
            for name, value in found.items():
                counts[name] = counts.get(name, 0) + int(value.sum())
    return {name: np.concatenate(values) for name, values in rows.items()}, counts


def _summary(values: np.ndarray) -> dict[str, float]:
    quantiles = {f"q{round(100 * q):02d}": float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES))}
    return {"mean": float(values.mean()), **quantiles}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _agreement(counts: dict[str, int], rule: str) -> dict[str, float | None]:
    both, only, missed, neither = (counts[f"{rule}_{name}"] for name in ("both", "only", "missed", "neither"))
    return {
        "accuracy": _share(both + neither, both + only + missed + neither),
        "precision": _share(both, both + only),
        "recall": _share(both, both + missed),
        "iou": _share(both, both + only + missed),
    }


def _plot(rows: dict[str, np.ndarray], statistics: dict, path: Path) -> None:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    ratio, coverage, flips = figure.subplots(1, 3)
    for name in ("labels", *RULES):
        if name in rows:
            style = {"alpha": 0.3} if name == "labels" else {"histtype": "step", "linewidth": 1.5}
            ratio.hist(rows[name], bins=25, range=(0, 1), label=f"{name}, mean {rows[name].mean():.2f}", **style)
    ratio.set(title="CLEAR ratio", xlabel="share of a record's patches", ylabel="records")
    ratio.legend(fontsize=8)
    for axes in (coverage, flips):
        if "coverage" not in rows:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "no masks", ha="center")
    if "coverage" in rows:
        coverage.hist(rows["coverage"], bins=10, range=(0, 1))
        coverage.set(title="Mask coverage", xlabel="share of a record's patches", ylabel="records")
        flips.hist(rows["flips"], bins=25, range=(0, 1))
        total = statistics["outside_mask"]["tokens_differ_same_pixels"]
        title = "Codes that differ outside the mask,\npixels the same"
        flips.set(title=title + ("" if total is None else f": {total:.1%} of all"), ylabel="records")
        flips.set_xlabel("share of a record's patches outside the mask")
    figure.savefig(path, dpi=110)


def _draw_examples(
    dataset: Dataset, checkpoint: Checkpoint, vocabulary: InstructionVocabulary, examples: int, seed: int, path: Path
) -> None:
    count = min(examples, len(dataset))
    if count == 0:
        return
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    grid = checkpoint.processor.grid
    figure = Figure(figsize=(9, 3.3 * count), layout="constrained")
    for row, panels in zip(dataset.with_format(None).select(chosen), figure.subplots(count, 3, squeeze=False)):
        source, target = _pictures(row, checkpoint, vocabulary)
        labels = torch.tensor(row["output_tokens"]).view(grid, grid)
        clear, painted = vocabulary.says(labels, CLEAR).numpy(), ~vocabulary.is_instruction(labels).numpy()
        colours = np.zeros((grid, grid, 4))
        colours[painted] = (1, 0, 0, 0.5)
        colours[~painted & ~clear] = (0, 0, 1, 0.5)
        legend = "the rest in red" if (painted | clear).all() else "painted in red, others in blue"
        extent = (0, source.width, source.height, 0)
        panels[0].imshow(source, extent=extent)
        panels[1].imshow(target, extent=extent)
        panels[2].imshow(source, extent=extent)
        panels[2].imshow(colours, extent=extent, interpolation="nearest")
        titles = (
            row["instruction"],
            f"target, decoded; {row['key']}" if "key" in row else "target, decoded",
            f"{clear.mean():.0%} CLEAR, {legend}",
        )
        for axes, title in zip(panels, titles):
            axes.set_axis_off()
            axes.set_title(textwrap.fill(title, 38), fontsize=9, parse_math=False)
    figure.savefig(path, dpi=80)


def _pictures(row: dict, checkpoint: Checkpoint, vocabulary: InstructionVocabulary) -> tuple[Image.Image, Image.Image]:
    """Square source and target; what has no picture is decoded from its codes."""
    source = torch.tensor([row["input_tokens"]])
    labels = torch.tensor([row.get("target_tokens") or row["output_tokens"]])
    copied = torch.tensor(row.get("transformed_tokens") or row["input_tokens"] * len(vocabulary))
    tokens = torch.cat([source, vocabulary.remap(labels, copied.view(1, len(vocabulary), -1))])
    decoded, target = map(to_image, checkpoint.token_model.decode(tokens))
    if row.get("source") is None:
        return decoded, target
    picture = load_image(row["source"], f"{row.get('key')}: source")
    return Letterbox(*picture.size, checkpoint.processor.image_size).fit(picture), target
