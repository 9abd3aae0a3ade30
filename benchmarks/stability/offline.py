"""What can be asked without decoding again: the label rules, mask cleaning, and the source code's own probability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from benchmarks.stability.measure import BATCH, fast, load
from benchmarks.stability.runs import SEEDS
from benchmarks.stability.train import gates, recipe
from thinkclearly.data.collator import Collator
from thinkclearly.data.splits import build_data
from thinkclearly.evaluation.calibration import fit_gate, gate_metrics
from thinkclearly.evaluation.metrics import clear_metrics
from thinkclearly.images import Letterbox, load_image
from thinkclearly.instructions import gate_log_odds
from thinkclearly.training.setup import build_checkpoint

CROSS = ndimage.generate_binary_structure(2, 1)


def label_noise(output: Path, records: int = 1200) -> dict:
    """Token equality against pixels: how often it errs, and where (by the winning code's margin and by texture)."""
    options, _ = recipe(output)
    checkpoint = build_checkpoint(options.model)
    rows = build_data(options.data, checkpoint, ["train"]).train.select(range(records))
    names = ["input_tokens", "target_tokens", "pixel_difference", "mask_tokens"]
    table = rows.select_columns(names).with_format("numpy")
    source, target, difference, mask = (np.stack(table[name]) for name in names)
    same, still = source == target, difference <= options.data.pixel_tolerance
    margin, texture = _margins(checkpoint, rows)
    found = {
        "records": records,
        "unchanged by pixels": still.mean(),
        "unchanged by tokens": same.mean(),
        "unchanged by mask": (mask == 0).mean(),
        "same token where pixels are unchanged": same[still].mean(),
        "same token where pixels changed": same[~still].mean(),
        "same token where not a pixel differs": same[difference == 0].mean(),
        "inside the mask but pixels unchanged": still[mask > 0].mean(),
    }
    for name, value in (("margin", margin), ("texture", texture)):
        edges = np.quantile(value[still], (0.25, 0.5, 0.75))
        which = np.digitize(value, edges)
        quarters = [same[still & (which == quarter)].mean() for quarter in range(4)]
        found[f"same token where unchanged, by quarter of {name}"] = quarters
    return {k: [float(x) for x in v] if isinstance(v, list) else float(v) for k, v in found.items()}


@torch.inference_mode()
def _margins(checkpoint, rows) -> tuple[np.ndarray, np.ndarray]:
    """Of every source patch: how much nearer the winning code is than the next (cosine), and its pixels' deviation."""
    vq, processor = checkpoint.network.model.vqmodel, checkpoint.processor
    codes = F.normalize(vq.quantize.embedding.weight, dim=-1)
    margins, textures = [], []
    for start in range(0, len(rows), BATCH):
        pictures = [read_picture(row, processor) for row in rows.select(range(start, min(len(rows), start + BATCH)))]
        pixels = processor.pixel_values(pictures)
        hidden = vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1).flatten(1, 2)
        best = (F.normalize(hidden, dim=-1) @ codes.T).topk(2).values
        margins.append((best[..., 0] - best[..., 1]).numpy())
        size = pixels.shape[-1] // processor.grid
        patches = F.unfold(pixels.mean(1, keepdim=True), size, stride=size)
        textures.append(patches.std(1).numpy() * 127.5)
    return np.concatenate(margins), np.concatenate(textures)


def read_picture(row: dict, processor):
    picture = load_image(row["source"])
    return Letterbox(*picture.size, processor.image_size).fit(picture)


# Rules on bool (g, g), True where CLEAR, with the gate's log-odds beside it.
def _small(mask: np.ndarray, least: int) -> np.ndarray:
    """Without the connected parts of fewer than `least` patches."""
    parts, count = ndimage.label(mask, CROSS)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    return mask & (sizes[parts] >= least)


def _hysteresis(clear: np.ndarray, gate: np.ndarray, sure: float) -> np.ndarray:
    """An edited part counts only where it has a patch that is surely edited; it then grows over doubtful ones."""
    parts, _ = ndimage.label(gate < 1, CROSS)
    seeds = np.unique(parts[gate < -sure])
    return ~np.isin(parts, seeds[seeds > 0])


CLEANING = {
    "none": lambda clear, gate: clear,
    "majority 3 x 3": lambda clear, gate: ndimage.uniform_filter(clear.astype(float), 3, mode="nearest") > 0.5,
    "opening of CLEAR": lambda clear, gate: ~ndimage.binary_closing(np.pad(~clear, 1), CROSS)[1:-1, 1:-1],
    "closing of CLEAR": lambda clear, gate: ndimage.binary_closing(np.pad(clear, 1, mode="edge"), CROSS)[1:-1, 1:-1],
    "no CLEAR part under 2": lambda clear, gate: _small(clear, 2),
    "no CLEAR part under 3": lambda clear, gate: _small(clear, 3),
    "no edited part under 2": lambda clear, gate: ~_small(~clear, 2),
    "hysteresis 1, -1": lambda clear, gate: _hysteresis(clear, gate, 1),
    "hysteresis 1, -2": lambda clear, gate: _hysteresis(clear, gate, 2),
}


def cleaning(output: Path) -> list[dict]:
    """Every rule on the masks of the default's held-out edits, all seeds."""
    stored = [np.load(gates(output, "default", seed, {})) for seed in SEEDS]
    names = ("gate", "clear", "chosen", "mask")
    gate, clear, chosen, mask = (np.concatenate([s[name] for s in stored]) for name in names)
    rows = []
    for name, rule in CLEANING.items():
        cleaned = np.stack([rule(c, g) for c, g in zip(chosen, gate)])
        truth, human = clear_metrics(cleaned.ravel(), clear.ravel()), clear_metrics(cleaned.ravel(), ~mask.ravel())
        holed = [bool((c & ~t & ndimage.binary_erosion(~t)).any()) for c, t in zip(cleaned, clear)]
        rows.append(
            {
                "rule": name,
                "f1": truth["f1"],
                "iou": human["edit_iou"],
                "false_clear": float((cleaned & ~clear).sum() / (~clear).sum()),
                "holed": float(np.mean(holed)),
            }
        )
    return rows


@torch.inference_mode()
def pointer_sum(output: Path, seed: int, records: int = 504) -> dict:
    """The gate with and without the probability of the literal source code, teacher-forced on held-out edits."""
    editor = load(output, "default", seed)
    model, (options, _) = editor.model, recipe(output)
    options.data.eval_samples, options.data.split_seed = records, options.data.split_seed + 1
    rows = build_data(options.data, build_checkpoint(options.model), ["test"]).test
    collate, codebook = Collator(editor.processor, model.vocabulary), model.vocabulary.codebook_size
    gates, summed, truth = [], [], []
    for start in range(0, len(rows), BATCH):
        batch = collate([rows[i] for i in range(start, min(len(rows), start + BATCH))])
        with fast():
            logits = model.teacher_forced_logits(**batch)
        logits[..., codebook:] -= torch.tensor(model.clear_config.clear_weight).log()
        own = batch["source_tokens"].unsqueeze(-1)
        copy = torch.logsumexp(torch.cat([logits[..., codebook:], logits.gather(-1, own)], -1), -1)
        rest = logits[..., :codebook].scatter(-1, own, -torch.inf).logsumexp(-1)
        gates.append(gate_log_odds(logits, codebook).numpy())
        summed.append((copy - rest).numpy())
        truth.append((batch["labels"] >= codebook).numpy())
    clear, found = np.concatenate(truth).ravel(), {}
    for name, values in (("CLEAR alone", gates), ("with the source code", summed)):
        gate = np.concatenate(values).ravel().astype(np.float64)
        bias, temperature = fit_gate(gate, clear)
        calibrated = (gate + bias) / temperature
        found[name] = gate_metrics(calibrated, clear) | {"f1": clear_metrics(calibrated > 0, clear)["f1"]}
        found[name] |= {"ece_uncalibrated": gate_metrics(gate, clear)["ece"]}
    return found
