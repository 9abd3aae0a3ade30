"""One point of the experiment: a trained model, settings and held-out edits in, one row of numbers out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import binary_erosion

from benchmarks.stability.train import folder, gates, recipe
from thinkclearly.data import sources
from thinkclearly.data.splits import build_data
from thinkclearly.editing.composite import composite
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.calibration import calibrate, calibrated_log_odds, gate_metrics
from thinkclearly.evaluation.edits import judge_shapes
from thinkclearly.evaluation.metrics import aggregate_clear_metrics, clear_metrics
from thinkclearly.files import write_json
from thinkclearly.images import Letterbox, patch_difference
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.models.instruction_head import write_clear_config
from thinkclearly.training.setup import build_checkpoint

BATCH = 24
CALIBRATION = "calibration.json"


def fast() -> torch.autocast:
    """bfloat16 arithmetic: on a CPU that has it, twice as fast; 0.8 % of the tokens change."""
    return torch.autocast("cpu", torch.bfloat16)


def load(output: Path, variant: str, seed: int) -> Editor:
    """The model, its gate calibrated on the records that the recipe holds out for that."""
    directory = folder(output, variant, seed)
    # Asked before the model is read: another process may calibrate it meanwhile.
    calibrated = (directory / CALIBRATION).is_file()
    model, processor = load_clear_model(directory, merge=True)
    editor = Editor(model, processor)
    if not calibrated:
        options, _ = recipe(output)
        rows = build_data(options.data, build_checkpoint(options.model), ["calibration"]).calibration
        with fast():
            found = calibrate(editor, rows, BATCH)
        write_clear_config(model.clear_config, directory)
        write_json(directory / CALIBRATION, found)
    return editor


def measure(output: Path, variant: str, seed: int, settings: dict, first: int, count: int) -> dict:
    """Edits `count` held-out pictures from number `first` on.

    Args:
        settings: of the edit, and `calibrated: False` to take the gate as it was trained.
    """
    editor = load(output, variant, seed)
    asked, settings = settings, dict(settings)
    if not settings.pop("calibrated", True):
        editor.model.clear_config.gate_bias, editor.model.clear_config.gate_temperature = 0.0, 1.0
    options = recipe(output)[0].data
    rows = sources.shapes(1536, size=options.shapes_size, seed=options.split_seed + 1, split="test")
    rows = rows.select(range(first, first + count))
    judge, edits = judge_shapes(), []
    for start in range(0, count, BATCH):
        examples = [sources.read_example(row) for row in rows.select(range(start, min(count, start + BATCH)))]
        with fast():
            results = editor.edit_many(
                [e.source for e in examples], [e.instruction for e in examples], seed=seed, **settings
            )
        edits += [_edit(example, result, editor, options, judge) for example, result in zip(examples, results)]
    gate, clear, chosen, masks = (np.stack([edit.pop(name) for edit in edits]) for name in _ARRAYS)
    file = gates(output, variant, seed, asked)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, gate=gate, clear=clear, chosen=chosen, mask=masks)
    truth = [clear_metrics(p.ravel(), t.ravel()) for p, t in zip(chosen, clear)]
    human = [clear_metrics(p.ravel(), ~t.ravel()) for p, t in zip(chosen, masks)]
    row = {f"clear_{k}": v for k, v in aggregate_clear_metrics(truth).items() if k in ("precision", "recall", "f1")}
    row["mask_iou"] = aggregate_clear_metrics(human)["edit_iou"]
    row |= {f"gate_{k}": v for k, v in gate_metrics(gate.ravel(), clear.ravel()).items()}
    row |= {name: float(np.mean([edit[name] for edit in edits])) for name in edits[0]}
    row["changed"] = float((~clear).mean())
    return row | {"passes_per_edit": results[0].passes}


_ARRAYS = ("gate", "clear", "chosen", "mask")


def _edit(example, result, editor: Editor, options, judge) -> dict:
    """Numbers of one edit, and its grids (g, g) for those that are pooled."""
    processor = editor.processor
    box = Letterbox(*example.source.size, processor.image_size)
    shape = processor.grid, processor.grid
    target = Letterbox(*example.target.size, processor.image_size).fit(example.target)
    clear = patch_difference(box.fit(example.source), target, processor.grid) <= options.pixel_tolerance
    chosen = editor.model.vocabulary.is_instruction(result.class_ids).view(shape).numpy()
    blend = result.settings["feather_radius_px"], result.settings["feather"]
    oracle = composite(example.source, result.raw, clear, box, *blend)
    mask = np.asarray(example.mask) > 127
    pictures = {
        "composite": result.image,
        "raw": result.raw,
        "matching": result.copy_matching_tokens(),
        "source": example.source,
        "oracle": oracle,
    }
    numbers = {}
    for name, picture in pictures.items():
        outside = _squares(picture, example.source)[~mask]
        numbers |= {
            f"{name}_done": judge(example.key, picture),
            f"{name}_mse_inside": _squares(picture, example.target)[mask].mean(),
            f"{name}_mse_outside": outside.mean(),
            f"{name}_exact_outside": (outside.max(-1) == 0).mean(),
        }
    false, joint = chosen & ~clear, result.settings["guidance"] == "joint"
    return numbers | {
        "false_clear": false.sum() / max(1, (~clear).sum()),
        "holed": bool((false & binary_erosion(~clear)).any()),
        "gate": (result.gate.numpy().astype(np.float64) if joint else calibrated_log_odds(result)).reshape(shape),
        "clear": clear,
        "chosen": chosen,
        "mask": box.fit_mask(example.mask, processor.grid),
    }


def _squares(picture, reference) -> np.ndarray:
    return np.square(np.asarray(picture.convert("RGB"), np.float32) - np.asarray(reference.convert("RGB"), np.float32))
