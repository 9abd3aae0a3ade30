"""The whole job on the tiny model, with a report to look at: data, fine-tune, held-out edits, real photographs."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from thinkclearly.data.options import DataArguments
from thinkclearly.data.shapes import Background, Scene, ShapeEdit, edit_scene, random_scene
from thinkclearly.data.sources import EditExample, photos_of, shapes
from thinkclearly.demo_thoughts import demonstrate
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.calibration import gate_metrics
from thinkclearly.evaluation.edits import Evaluation, best_median_worst, evaluate_edits, evaluate_rows
from thinkclearly.evaluation.report import machine, write_report
from thinkclearly.files import write_json
from thinkclearly.images import load_image
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.recipe import option
from thinkclearly.reporting.tables import ROW_LABELS, format_number
from thinkclearly.training.methods import parse_options
from thinkclearly.training.run import train

logger = logging.getLogger(__name__)

SHOWN = 12  # edits of a kind that the report shows in full


@dataclass
class DemoArguments:
    """What the demo does besides training."""

    demo_edits: int = option(120, "Held-out edits that are measured.")
    demo_photo_edits: int = option(12, "Edits of whole photographs at their own size; 0 for none.")
    demo_prompts: int = option(100, "method interleaved: held-out prompts that are thought about, instead of edits.")
    demo_batch_size: int = option(20, "Pictures that are edited at once, or thoughts.")

    def __post_init__(self):
        for name, least in (("demo_edits", 1), ("demo_photo_edits", 0), ("demo_prompts", 1), ("demo_batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; expected {least} or more")


def photo_edits(count: int, photos: list[str], seed: int = 7) -> list[tuple[ShapeEdit, EditExample]]:
    """Edits on whole photographs at their own size."""
    pairs = []
    operations = ("recolour", "remove", "add", "replace", "move")
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        photo = photos[i % len(photos)]
        scene = replace(random_scene(rng, [], shapes=2), background=Background(photo=photo))
        edit = edit_scene(Scene(scene.background, scene.shapes), operations[i % len(operations)], rng)
        width, height = load_image(photo).size
        source, target, mask = edit.render(width, height)
        pairs.append((edit, EditExample(source, target, edit.instruction, mask, key=f"photo {i}")))
    return pairs


def held_out_edits(count: int, data: DataArguments) -> Dataset:
    """Photo pairs on the photographs that are held out, other ones than training evaluates on."""
    options = {"size": data.shapes_size, "seed": data.split_seed + 1, "photos_folder": data.photos_folder}
    return shapes(count, split="test", **options)


def main(argv: list[str] | None = None) -> None:
    options, method, demo = parse_options(argv, "thinkclearly demo", also=(DemoArguments,))
    if options.training.method == "interleaved":
        return demonstrate(options, method, demo.demo_prompts, demo.demo_batch_size)
    data, training = options.data, options.training
    output = Path(training.output_dir)
    training.output_dir = str(output / "checkpoint")
    data.prepared_dir = str(output / "prepared")
    seconds = {}
    started = time.perf_counter()
    history = train(options, method)
    seconds["prepare and train"] = time.perf_counter() - started

    # What is measured is what was saved, read back as a user would.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    editor = Editor(*load_clear_model(training.output_dir, device=device, merge=True))
    started = time.perf_counter()
    held_out = evaluate_rows(editor, held_out_edits(demo.demo_edits, data), data, demo.demo_batch_size)
    measured = {"edits": held_out}
    if demo.demo_photo_edits:
        photos = photo_edits(demo.demo_photo_edits, photos_of("test", data.photos_folder))
        judges = {example.key: edit for edit, example in photos}
        measured["photographs"] = evaluate_edits(
            editor,
            (example for _, example in photos),
            judge=lambda key, picture: judges[key].is_done(picture),
            pixel_tolerance=data.pixel_tolerance,
            batch_size=demo.demo_batch_size,
        )
    seconds["edit and measure"] = time.perf_counter() - started

    metrics = {
        "held_out": {
            "edits": demo.demo_edits,
            "pictures": held_out.pictures,
            "clear": held_out.clear,
            "done": held_out.done,
            "gate": gate_metrics(held_out.log_odds, held_out.instructed),
        },
        "seconds": seconds,
        "machine": machine(),
    }
    photographs = measured.get("photographs")
    if photographs:
        parts = ("pictures", "clear", "done")
        metrics["photographs"] = {part: getattr(photographs, part) for part in parts}
    write_json(output / "metrics.json", metrics)
    for name, evaluation in measured.items():
        for number, result in enumerate(evaluation.results):
            result.save(output / name / f"{number:04d}")
    report(output, held_out, photographs, history, seconds)
    logger.info("%s", summary(held_out))
    logger.info("%s: open report.html", output)


def summary(evaluation: Evaluation) -> str:
    """The numbers that matter, in words."""
    labels, composite = evaluation.clear["labels"], evaluation.pictures["pixel_composite"]
    gain = composite["psnr_pooled_outside"] - evaluation.pictures["raw"]["psnr_pooled_outside"]
    return (
        f"{evaluation.done['pixel_composite']:.0%} of the asked edits are done (raw decode: "
        f"{evaluation.done['raw']:.0%}). Outside the true mask {composite['exact_outside']:.1%} of the pixels are the "
        f"source's, byte for byte, and the composite is {gain:.1f} dB above the raw decode. CLEAR F1 "
        f"{labels['f1']:.3f} (always CLEAR: {labels['f1_always_clear']:.3f}), IoU of the edit with the true mask "
        f"{evaluation.clear['mask']['edit_iou']:.3f}."
    )


def results(evaluation: Evaluation) -> list[list[str]]:
    """The table of results as text, headings first: what is kept, and whether the edit was done."""
    head = ["", "PSNR outside, pooled", "Bit-identical pixels outside", "MSE to the target inside", "Edit done"]
    columns = {"psnr_pooled_outside": "{:.1f} dB", "exact_outside": "%", "mse_inside": "{:.0f}"}
    return [head] + [
        [ROW_LABELS.get(name, name)]
        + [format_number(numbers[key], form) for key, form in columns.items()]
        + [f"{evaluation.done[name]:.0%}"]
        for name, numbers in evaluation.pictures.items()
    ]


def report(
    output: Path, held_out: Evaluation, photographs: Evaluation | None, log_history: list[dict], seconds: dict
) -> None:
    """Writes report.html: the best, the median and the worst edits, one table, and the rest folded up."""
    measured = {f"{len(held_out.results)} held-out edits": held_out}
    if photographs:
        measured = {f"{len(photographs.results)} edits of whole photographs at their own size": photographs} | measured
    picks, metrics, rows = {}, {}, []
    for heading, found in measured.items():
        chosen = best_median_worst(found.scores)
        picks[heading] = {name: found.reports[index] for name, index in chosen.items()}
        metrics |= {heading: found.pictures, f"{heading}: CLEAR against pixel labels and true masks": found.clear}
        rows += found.reports[:SHOWN]
    gate = gate_metrics(held_out.log_odds, held_out.instructed)
    write_report(
        output,
        "ThinkClearly demo",
        lead="The best, the median and the worst edits, ranked by the composite's PSNR against the true target.",
        picks=picks,
        results=results(held_out),
        remarks=summary(held_out),
        rows=rows,
        metrics=metrics,
        curves=log_history,
        gate=(held_out.log_odds, held_out.instructed),
        notes={
            "Gate": f"AUC {format_number(gate['auc'], '{:.4f}')}, "
            f"calibration error {format_number(gate['ece'], '{:.3f}')}",
            "Machine": machine(),
            "Time": ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()),
        },
    )
