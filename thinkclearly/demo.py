"""The whole job on the tiny model, with a report to look at: data, fine-tune, held-out edits, real photographs."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from thinkclearly.data.shapes import Background, Scene, ShapeEdit, edit_scene, random_scene
from thinkclearly.data.sources import EditExample, photos_of, shapes
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.calibration import gate_metrics
from thinkclearly.evaluation.edits import evaluate_edits, evaluate_rows
from thinkclearly.evaluation.report import machine, write_report
from thinkclearly.evaluation.tables import format_number
from thinkclearly.files import write_json
from thinkclearly.images import load_image
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.recipe import option
from thinkclearly.training.methods import parse_options
from thinkclearly.training.run import train

logger = logging.getLogger(__name__)


@dataclass
class DemoArguments:
    """What the demo does besides training."""

    demo_edits: int = option(120, "Held-out edits that are measured.")
    demo_photo_edits: int = option(4, "Edits of whole photographs at their own size; 0 for none.")
    demo_batch_size: int = option(20, "Pictures that are edited at once.")

    def __post_init__(self):
        for name, least in (("demo_edits", 1), ("demo_photo_edits", 0), ("demo_batch_size", 1)):
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


def main(argv: list[str] | None = None) -> None:
    options, method, demo = parse_options(argv, "thinkclearly demo", also=(DemoArguments,))
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
    options = {"size": data.shapes_size, "seed": data.split_seed + 1, "photos_folder": data.photos_folder}
    rows = shapes(demo.demo_edits, split="test", **options)
    held_out = evaluate_rows(editor, rows, data, demo.demo_batch_size)
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
            "gate": gate_metrics(held_out.log_odds, held_out.unchanged),
        },
        "seconds": seconds,
        "machine": machine(),
    }
    tables = {
        f"{demo.demo_edits} held-out edits": held_out.pictures,
        "CLEAR against pixel labels and true masks": held_out.clear,
    }
    reports = held_out.reports
    if photographs := measured.get("photographs"):
        parts = ("pictures", "clear", "done")
        metrics["photographs"] = {part: getattr(photographs, part) for part in parts}
        tables["Whole photographs"] = photographs.pictures
        reports = photographs.reports + reports
    write_json(output / "metrics.json", metrics)
    for name, evaluation in measured.items():
        for number, result in enumerate(evaluation.results):
            result.save(output / name / f"{number:04d}")
    write_report(
        output,
        reports,
        tables,
        history,
        "ThinkClearly demo",
        notes=_notes(held_out, seconds),
        gate=(held_out.log_odds, held_out.unchanged),
    )
    logger.info("%s", summary(held_out))
    logger.info("%s: open report.html", output)


def summary(evaluation) -> str:
    """The numbers that matter, in words."""
    pictures, clear = evaluation.pictures, evaluation.clear
    gain = pictures["pixel_composite"]["psnr_pooled_outside"] - pictures["raw"]["psnr_pooled_outside"]
    return (
        f"CLEAR F1 {clear['labels']['f1']:.3f}, IoU of the edit with the true mask {clear['mask']['edit_iou']:.3f}; "
        f"edit done: composite {evaluation.done['pixel_composite']:.0%}, raw {evaluation.done['raw']:.0%}; "
        f"outside the true mask the composite is {gain:.1f} dB above the raw decode and "
        f"{pictures['pixel_composite']['exact_outside']:.1%} of its pixels are the source's, byte for byte"
    )


def _notes(evaluation, seconds: dict) -> dict[str, str]:
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    done = ", ".join(f"{name} {share:.0%}" for name, share in evaluation.done.items())
    gate = gate_metrics(evaluation.log_odds, evaluation.unchanged)
    honest = f"AUC {format_number(gate['auc'], '{:.4f}')}, calibration error {format_number(gate['ece'], '{:.3f}')}"
    return {
        "In short": summary(evaluation),
        "Edits done": done,
        "Gate": honest,
        "Machine": machine(),
        "Time": times,
    }
