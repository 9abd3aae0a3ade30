"""Runs an editor over held-out edits and says how well it did: pictures, CLEAR masks, and whether the edit was done.

Knows nothing of training or files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from thinkclearly.data.options import DataArguments
from thinkclearly.data.shapes import random_edit
from thinkclearly.data.sources import EditExample, photos_of, read_example
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.calibration import calibrated_log_odds
from thinkclearly.evaluation.metrics import (
    aggregate_clear_metrics,
    aggregate_image_metrics,
    clear_metrics,
    image_metrics,
)
from thinkclearly.images import Letterbox, patch_difference
from thinkclearly.instructions import CLEAR
from thinkclearly.reporting.tables import format_number


@dataclass
class Evaluation:
    """Metrics of a set of edits.

    Attributes:
        pictures: row (raw, token_composite, …) → aggregated `image_metrics`; `_outside` is against the source,
            `_inside` against the target, plain numbers against the source.
        clear: "labels" and, with masks, "mask" → aggregated `clear_metrics` of the model's own decisions; of every
            instruction besides CLEAR the same against the pixels, by its name.
        done: row → share of edits that were done, where a judge was given.
        log_odds: float (edits·N,), calibrated log-odds of copying; empty where there is no gate to speak of.
        instructed: bool (edits·N,), whether CLEAR, or another instruction, was true there, by pixels.
        scores: float (edits,), PSNR of the whole composite against the target, dB.
        reports: one dict an edit for `write_report`.
        results: one `EditResult` an edit.
    """

    pictures: dict[str, dict]
    clear: dict[str, dict]
    done: dict[str, float]
    log_odds: np.ndarray
    instructed: np.ndarray
    scores: np.ndarray
    reports: list[dict]
    results: list


def evaluate_edits(
    editor,
    examples: Iterable[EditExample],
    *,
    judge: Callable[[str, Image.Image], bool] | None = None,
    pixel_tolerance: int = 16,
    batch_size: int = 16,
    seed: int = 0,
    total: int | None = None,
) -> Evaluation:
    """Edits every example's source and compares with source, target and mask. Keeps all pictures in memory.

    Rows: `raw`, `token_composite`, `pixel_composite`, `copy_matching_tokens` (the raw codes, pixels copied where they
    equal the source's: no CLEAR needed), `input_decoded`, `copy_source` (edits nothing).

    Args:
        examples: with targets of the sources' sizes; inside and outside need masks.
        judge: (key, picture) → whether the asked edit is done.
        pixel_tolerance: where the target and an instruction's transform of the source differ by no more, of 255, that
            instruction is the true label; CLEAR's is the source itself.
    """
    images: dict[str, list[dict]] = {}
    clears: dict[str, list[dict]] = {"labels": []}
    done: dict[str, list[bool]] = {}
    log_odds, instructed, scores = [], [], []
    vocabulary = editor.model.vocabulary
    reports: list[dict] = []
    kept: list = []
    with tqdm(total=total, desc="edit", unit="picture") as bar:
        for batch in _batches(examples, batch_size):
            results = editor.edit_many([e.source for e in batch], [e.instruction for e in batch], seed=seed)
            for example, result in zip(batch, results):
                rows = {
                    "raw": result.raw,
                    "token_composite": result.token_composite,
                    "pixel_composite": result.image,
                    "copy_matching_tokens": result.copy_matching_tokens(),
                    "input_decoded": result.input_decoded,
                    "copy_source": example.source,
                }
                mask = None if example.mask is None else np.asarray(example.mask) > 127
                for name, picture in rows.items():
                    images.setdefault(name, []).append(_compare(picture, example, mask))
                    if judge is not None:
                        done.setdefault(name, []).append(judge(example.key, picture))
                truth = _true_instructions(example, editor, pixel_tolerance)
                chosen = vocabulary.says(result.class_ids, CLEAR).numpy()
                instructed.append(np.any([*truth.values()], axis=0))
                log_odds.append(calibrated_log_odds(result))
                clears["labels"].append(clear_metrics(chosen, truth[CLEAR]))
                for name in [name for name in truth if name != CLEAR]:
                    says = vocabulary.says(result.class_ids, name).numpy()
                    clears.setdefault(name, []).append(clear_metrics(says, truth[name]))
                if mask is not None:
                    box = Letterbox(*example.source.size, editor.processor.image_size)
                    touched = box.fit_mask(example.mask, editor.processor.grid).ravel()
                    clears.setdefault("mask", []).append(clear_metrics(chosen, ~touched))
                kept.append(result)
                scores.append(image_metrics(result.image, example.target, ssim=False)["psnr"])
                judged = None if judge is None else done["pixel_composite"][-1]
                reports.append(_report(example, result, judged, scores[-1]))
            bar.update(len(batch))
    return Evaluation(
        {name: aggregate_image_metrics(rows) for name, rows in images.items()},
        {name: aggregate_clear_metrics(rows) for name, rows in clears.items()},
        {name: float(np.mean(values)) for name, values in done.items()},
        *_with_gate(log_odds, instructed),
        np.array(scores),
        reports,
        kept,
    )


def _with_gate(log_odds: list[np.ndarray], instructed: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """As flat arrays, without the positions that have no log-odds."""
    gate, truth = np.concatenate(log_odds), np.concatenate(instructed)
    return gate[np.isfinite(gate)], truth[np.isfinite(gate)]


def _batches(examples: Iterable[EditExample], size: int):
    batch = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _compare(picture: Image.Image, example: EditExample, mask: np.ndarray | None) -> dict:
    """Against the source, but inside the mask against the target."""
    row = image_metrics(picture, example.source, mask)
    if mask is not None:
        inside = image_metrics(picture, example.target, mask)
        row.update({key: value for key, value in inside.items() if key.endswith("_inside")})
    return row


def _true_instructions(example: EditExample, editor, tolerance: int) -> dict[str, np.ndarray]:
    """True positions of each instruction by pixels, bool (N,), as `data.prepare` labels them; always CLEAR's."""
    size, grid, vocabulary = editor.processor.image_size, editor.processor.grid, editor.model.vocabulary
    if CLEAR not in vocabulary.names:  # a model that cannot copy is measured all the same
        vocabulary = replace(vocabulary, names=(*vocabulary.names, CLEAR))
    target = Letterbox(*example.target.size, size).fit(example.target)
    squares = map(Letterbox(*example.source.size, size).fit, vocabulary.transforms(example.source))
    holds = [patch_difference(square, target, grid).ravel() <= tolerance for square in squares]
    labels = vocabulary.label(torch.zeros(grid * grid, dtype=torch.long), torch.from_numpy(np.stack(holds)))
    return {name: vocabulary.says(labels, name).numpy() for name in vocabulary.names}


def best_median_worst(scores: np.ndarray) -> dict[str, int]:
    """Indices of the edits with the highest, the middle and the lowest score."""
    order = np.argsort(-scores, kind="stable").tolist()
    return {"Best": order[0], "Median": order[len(order) // 2], "Worst": order[-1]}


def _report(example: EditExample, result, done: bool | None, score: float) -> dict:
    note = f"{format_number(score, '{:.1f} dB')} against the true target, {result.clear_fraction:.0%} CLEAR"
    if done is not None:
        note += ", edit done" if done else ", edit not done"
    edited = ~(np.asarray(result.mask) > 127)
    return {
        "source": result.source,
        "instruction": example.instruction,
        "raw": result.raw,
        "composite": result.image,
        "mask": edited,
        "target": example.target,
        "note": note,
    }


def judge_shapes(photos_folder: str | None = None):
    """A judge for the built-in shapes of "test": (key, picture) → whether the edit that the key names is done."""
    photos = tuple(photos_of("test", photos_folder))

    def judge(key: str, picture: Image.Image) -> bool:
        seed, number = map(int, re.fullmatch(r"shapes\[(\d+):(\d+)\]", key).groups())
        return random_edit(seed, number, photos).is_done(picture)

    return judge


def evaluate_rows(editor: Editor, rows: Dataset, data: DataArguments, batch_size: int) -> Evaluation:
    """Edits held-out pairs and measures; see `evaluation.edits`."""
    return evaluate_edits(
        editor,
        (read_example(row) for row in rows),
        judge=judge_shapes(data.photos_folder) if data.source == "shapes" else None,
        pixel_tolerance=data.pixel_tolerance,
        batch_size=batch_size,
        total=len(rows),
    )
