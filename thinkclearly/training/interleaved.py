"""`method: interleaved`: words and pictures that alternate in one stream, as "Thinking with Generated Images" trains.

Cross-entropy over everything that the model says and draws, and λ times the reconstruction of codebook rows. Edited
pictures may have labels over K + I classes, so that a second picture copies what is right in the first. Source:
GAIR-NLP/thinking-with-generated-images, finetune.py (arXiv 2505.22525).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from thinkclearly.data.interleaved import build_thoughts
from thinkclearly.data.splits import PreparedData
from thinkclearly.data.streams import StreamCollator, StreamDropout
from thinkclearly.evaluation.calibration import fit_gate, gate_metrics
from thinkclearly.models.instruction_head import write_clear_config
from thinkclearly.models.load import Checkpoint
from thinkclearly.models.stream import PLACES, StreamModel, StreamScores
from thinkclearly.recipe import check_choice, option
from thinkclearly.training.callbacks import EpochOfDropout
from thinkclearly.training.options import Options
from thinkclearly.training.setup import build_model, new_config
from thinkclearly.training.supervised import SupervisedTrainer

logger = logging.getLogger(__name__)

DROPS = ("drop_all", "drop_context", "drop_words")


@dataclass
class InterleavedArguments:
    """The objective."""

    reconstruction_weight: float = option(1.0, "λ, weight of the codebook rows' reconstruction; 0 for none.")
    reconstruction_at: str = option(
        "next", "Hidden states that are projected: next, which predict a code, or own, which have read it (original)."
    )
    instructions: list[str] = option([], "Instruction tokens of edited pictures: CLEAR, or none as the original.")
    clear_weight: float = option(1.0, "Class weight of CLEAR; inference takes its logarithm off again.")
    drop_all: float = option(0.0, "Share of records that show one picture told nothing (trains the uncond row).")
    drop_context: float = option(0.0, "Share that show the last picture told the bare prompt (trains the prompt row).")
    drop_words: float = option(0.0, "Share that show pictures without any words (trains the pictures row).")

    def __post_init__(self):
        check_choice("reconstruction_at", self.reconstruction_at, PLACES)
        for name, least in (("reconstruction_weight", 0), ("clear_weight", 1e-6)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected a number of {least} or more")
        shares = [getattr(self, name) for name in DROPS]
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"{', '.join(f'{n}={s}' for n, s in zip(DROPS, shares))}; expected shares, in all up to 1"
            )


Arguments = InterleavedArguments


class StreamTrainer(SupervisedTrainer):
    """Fine-tunes a `StreamModel`.

    The cross-entropy is the mean over all labelled ids of an optimizer step, and the reconstruction that over all
    elements of all its pictures, whatever the micro-batches and processes. Both are logged, with the accuracy of words
    and of codes, and with CLEAR how often it is right and is said.

    Args:
        reconstruction_weight: λ.
        kwargs: `SupervisedTrainer`'s.
    """

    train_mean_names = ("ce", "reconstruction", "accuracy", "code_accuracy", "clear_rate_true", "clear_rate_predicted")

    def __init__(self, model: StreamModel, reconstruction_weight: float = 1.0, **kwargs):
        if not len(model.vocabulary):
            self.train_mean_names = self.train_mean_names[:4]
        super().__init__(model=model, **kwargs)
        self.reconstruction_weight = reconstruction_weight
        self.code_ids = model.token_model.code_ids.to(self.args.device)
        self.elements = model.token_model.grid**2 * model.token_model.feature_size  # of a picture

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Over all micro-batches and processes of one optimizer step (2,): weights of labels, elements of pictures."""
        totals = torch.zeros(2)
        for batch in batch_samples:
            weights = self.vocabulary.weights(batch["edit_labels"], self.instruction_weight).sum()
            totals[0] += len(batch["word_labels"]) + weights.cpu()
            totals[1] += len(batch["picture_rows"]) * self.elements
        return self.accelerator.gather(totals.to(device)[None]).sum(0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a training step; evaluation has sums of its own, see `prediction_step`."""
        scores: StreamScores = model(**inputs)
        weights, elements = num_items_in_batch
        edits = scores.edits.nll * self.vocabulary.weights(inputs["edit_labels"], self.instruction_weight)
        ce = (scores.nll.sum() + edits.sum()) / weights
        # Without pictures it is 0, and yet has a gradient: processes must agree on which weights have one.
        reconstruction = scores.squared_error.sum() / elements.clamp(min=1)
        # Processes average their gradients; the totals are already the global ones.
        loss = self.accelerator.num_processes * (ce + self.reconstruction_weight * reconstruction)
        with torch.no_grad():
            self.measure("train", scores, inputs)
        return (loss, scores) if return_outputs else loss

    def measure(self, mode: str, scores: StreamScores, inputs: dict) -> None:
        if mode == "train":
            for name, (_, values, weights) in self._quantities(scores, inputs, self.instruction_weight).items():
                if len(values):
                    self.train_means[name].update(values.float(), weights.float())

    def _row_sums(self, scores: StreamScores, inputs: dict) -> torch.Tensor:
        """Of each record (B, 2, M): what makes the mean of each of M quantities, its values and its weights."""
        found = self._quantities(scores, inputs, self.eval_instruction_weight)
        sums = scores.nll.new_zeros(len(inputs["input_ids"]), 2, len(found))
        for m, (rows, values, weights) in enumerate(found.values()):
            sums[:, :, m].index_add_(0, rows, torch.stack([values * weights, weights.float()], dim=-1))
        return sums

    def sums_to_metrics(self, values: list[float], weights: list[float]) -> dict[str, float]:
        found = {name: v / w for name, v, w in zip(self.train_mean_names, values, weights) if w}
        return found | {"loss": found["ce"] + self.reconstruction_weight * found.get("reconstruction", 0.0)}

    def _quantities(self, scores: StreamScores, inputs: dict, instruction_weight: float) -> dict[str, tuple]:
        """What is logged: name → rows that the items belong to, long (M,), their values and their weights (M,)."""
        labels, predicted = inputs["edit_labels"].flatten(), scores.edits.predicted.flatten()
        edit_rows = inputs["edit_rows"].repeat_interleave(inputs["edit_labels"].shape[1])
        copied, is_code = self.vocabulary.is_instruction(labels), torch.isin(inputs["word_labels"], self.code_ids)
        rows = torch.cat([inputs["word_rows"], edit_rows])
        right = torch.cat([scores.word == inputs["word_labels"], predicted == labels]).float()
        nll = torch.cat([scores.nll, scores.edits.nll.flatten()])
        weights = torch.cat([torch.ones_like(scores.nll), self.vocabulary.weights(labels, instruction_weight)])
        error, said = scores.squared_error / self.elements, self.vocabulary.is_instruction(predicted).float()
        found = (
            (rows, nll, weights),
            (inputs["picture_rows"], error, torch.ones_like(error)),
            (rows, right, torch.cat([~is_code, torch.zeros_like(copied)])),
            (rows, right, torch.cat([is_code, ~copied])),
            (edit_rows, copied.float(), torch.ones_like(said)),
            (edit_rows, said, torch.ones_like(said)),
        )
        return dict(zip(self.train_mean_names, found))


Trainer = StreamTrainer


def instructions(options: Options) -> list[str]:
    """Instruction tokens of the model that `build` makes."""
    return options.method.instructions


def read_data(options: Options, checkpoint: Checkpoint) -> PreparedData:
    """Streams in parts that share no picture and no prompt; one to calibrate on where there is a gate."""
    return build_thoughts(options.data, checkpoint, calibration=bool(options.method.instructions))


def build(options: Options, checkpoint: Checkpoint, data: PreparedData, kind: type) -> StreamTrainer:
    """A trainer with the objective that the options describe."""
    own = options.method
    config = new_config(checkpoint, options.settings, instructions=own.instructions, clear_weight=own.clear_weight)
    model = StreamModel.of(build_model(options, checkpoint, config), own.reconstruction_at)
    dropout = StreamDropout(*(getattr(own, name) for name in DROPS), seed=options.training.seed)
    collator = StreamCollator(checkpoint.processor, model.vocabulary, dropout)
    return kind(
        model=model,
        processor=checkpoint.processor,
        reconstruction_weight=own.reconstruction_weight,
        instruction_weight=own.clear_weight,
        data_collator=collator,
        args=options.training,
        train_dataset=data.train,
        eval_dataset=data.test,
        callbacks=[EpochOfDropout(collator)],
    )


def finish(trainer: StreamTrainer, data: PreparedData) -> dict[str, float]:
    """Calibrates the gate on the records held out for it, by one forward pass over each; what came of it."""
    if data.calibration is None:
        return {}
    if trainer.weights_are_sharded:
        logger.warning("The gate stays uncalibrated: its weights are sharded")
        return {}
    found = {}
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).eval()
        log_odds, clear = _gate(trainer, model, data.calibration)
        try:
            bias, temperature = fit_gate(log_odds, clear)
        except ValueError as error:  # nothing to fit
            logger.warning("The gate stays uncalibrated: %s", error)
        else:
            config = model.clear_config
            config.gate_bias, config.gate_temperature = bias, temperature
            write_clear_config(config, trainer.args.output_dir)
            auc = gate_metrics(log_odds, clear)["auc"]
            found = {"gate_bias": bias, "gate_temperature": temperature, "gate_auc": auc}
    trainer.accelerator.wait_for_everyone()
    return found


@torch.no_grad()
def _gate(trainer: StreamTrainer, model: StreamModel, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of copying, as inference sees them, and whether it is right, at all positions of edited pictures."""
    gates, clears, size = [np.zeros(0)], [np.zeros(0, bool)], trainer.args.per_device_eval_batch_size
    for start in range(0, len(rows), size):
        batch = trainer.eval_collator(list(rows.select(range(start, min(start + size, len(rows))))))
        with trainer.compute_loss_context_manager():
            scores = model(**{name: value.to(trainer.args.device) for name, value in batch.items()})
        gates.append(scores.edits.gate.flatten().cpu().numpy() - math.log(model.clear_config.clear_weight))
        clears.append(model.vocabulary.is_instruction(batch["edit_labels"]).flatten().numpy())
    return np.concatenate(gates).astype(np.float64), np.concatenate(clears)
