"""SupervisedTrainer: transformers' Trainer with one weighted cross-entropy over codes, instructions and words.

Knows how the loss is counted and logged. Does not know where data come from, nor which instructions
there are: those of Janus-4o's training are none.
"""

from __future__ import annotations

import torch
from torchmetrics import MeanMetric

from thinkclearly.data.collator import Collator
from thinkclearly.models.cross_entropy import Scores, weighted_loss
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor
from thinkclearly.training.base import ModelTrainer


class SupervisedTrainer(ModelTrainer):
    """Fine-tunes an `InstructionModel`.

    Besides the loss it logs the accuracy over all classes, and that of answers where there are any. Evaluation counts
    every record once, so its numbers are the same for any batch size and number of processes.

    Args:
        model: with LoRA inside, or bare for full fine-tuning.
        processor: saved beside every checkpoint.
        data_collator: with condition dropout; evaluation uses the same without dropout.
        instruction_weight: class weight of instruction tokens; callbacks may move it. The evaluation loss keeps this
            one, so that its values can be compared.
        answer_weight: weight of a word of an answer, where a code has 1.
        kwargs: the Trainer's own.
    """

    loss_is_scaled_for_ga = True
    train_mean_names = ("accuracy", "answer_accuracy")

    def __init__(
        self,
        model: InstructionModel,
        processor: Processor,
        data_collator: Collator,
        instruction_weight: float = 1.0,
        answer_weight: float = 1.0,
        **kwargs,
    ):
        super().__init__(model=model, processor=processor, data_collator=data_collator, **kwargs)
        self.vocabulary = model.vocabulary
        self.instruction_weight = self.eval_instruction_weight = instruction_weight
        self.answer_weight = answer_weight
        self.eval_collator = data_collator.without_dropout()
        self.train_means = {name: MeanMetric().to(self.args.device) for name in self.train_mean_names}

    # ---- the loss ----------------------------------------------------------------------------------------------

    def code_weights(self, inputs: dict, instruction_weight: float) -> torch.Tensor:
        """Weight of each label, float32 (D, N); 0 where a position carries no loss."""
        weights = self.vocabulary.weights(inputs["labels"], instruction_weight)
        return weights * inputs["counted"] if "counted" in inputs else weights

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Sum of weights over all micro-batches and processes of one optimizer step."""
        total = torch.zeros(())
        for batch in batch_samples:
            total = total + self.code_weights(batch, self.instruction_weight).sum()
            total = total + self.answer_weight * len(batch.get("word_labels", ()))
        return self.accelerator.gather(total.to(device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a training step; evaluation has sums of its own, see `prediction_step`."""
        scores = model(**_model_inputs(inputs))
        nll, weights = scores.nll.flatten(), self.code_weights(inputs, self.instruction_weight).flatten()
        if scores.word_nll is not None:
            nll = torch.cat([nll, scores.word_nll])
            weights = torch.cat([weights, torch.full_like(scores.word_nll, self.answer_weight)])
        # Processes average their gradients; the sum of weights is already the global one.
        loss = self.accelerator.num_processes * weighted_loss(nll, weights, num_items_in_batch)
        with torch.no_grad():
            self.measure("train", scores, inputs)
        return (loss, scores) if return_outputs else loss

    def measure(self, mode: str, scores: Scores, inputs: dict) -> None:
        """Takes what is logged out of a batch's scores; `mode` is "train" or "eval". Methods add their own."""
        if mode == "train":
            right = (scores.predicted == inputs["labels"]).float()
            self.train_means["accuracy"].update(right, (self.code_weights(inputs, 1.0) > 0).float())
            if scores.word is not None:
                self.train_means["answer_accuracy"].update((scores.word == inputs["word_labels"]).float())

    # ---- evaluation --------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Adds the rows of all processes to the sums, without the duplicates that fill up the last batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            scores = model(**_model_inputs(inputs))
            self.eval_sums = self.eval_sums + self.accelerator.gather_for_metrics(self._row_sums(scores, inputs)).sum(
                0
            )
            self.measure("eval", scores, inputs)
        return None, None, None

    def _row_sums(self, scores: Scores, inputs: dict) -> torch.Tensor:
        """What evaluation adds up, float32 (B, S); `sums_to_metrics` divides.

        Of each row (S = 6): weighted loss, weights, codes right and counted, words right and counted.
        """
        weights = self.code_weights(inputs, self.eval_instruction_weight)
        counted = (weights > 0).float()
        right = (scores.predicted == inputs["labels"]).float() * counted
        columns = torch.stack([scores.nll * weights, weights, right, counted], dim=-1).sum(1)
        sums = columns.new_zeros(len(inputs["input_ids"]), 6)
        sums[inputs["drawn_slots"] >= 0, :4] = columns
        if scores.word_nll is not None:
            right, one = (scores.word == inputs["word_labels"]).float(), torch.ones_like(scores.word_nll)
            words = torch.stack([self.answer_weight * scores.word_nll, self.answer_weight * one, right, one], dim=-1)
            sums[:, [0, 1, 4, 5]] = sums[:, [0, 1, 4, 5]].index_add(0, inputs["word_rows"], words)
        return sums

    def get_eval_dataloader(self, eval_dataset=None):
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self.eval_sums = torch.zeros((), device=self.args.device)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self.sums_to_metrics(*self.eval_sums.tolist()) | self.eval_metrics()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def sums_to_metrics(self, loss, weight, right, counted, words_right, words) -> dict[str, float]:
        """Means over all that was evaluated, from the sums of `_row_sums`."""
        found = {"loss": loss / weight}
        if counted:
            found["accuracy"] = right / counted
        if words:
            found["answer_accuracy"] = words_right / words
        return found

    def eval_metrics(self) -> dict[str, float]:
        """What a method's `measure` found in the evaluation that ends here."""
        return {}

    def train_metrics(self) -> dict[str, float]:
        """Since the last call; what was never seen is left out."""
        values = {name: float(metric.compute()) for name, metric in self.train_means.items()}
        for metric in self.train_means.values():
            metric.reset()
        return {name: value for name, value in values.items() if value == value}

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log({**logs, **self.train_metrics()} if "loss" in logs else logs, *args, **kwargs)


def _model_inputs(inputs: dict) -> dict:
    """Without what only the loss reads."""
    return {name: value for name, value in inputs.items() if name != "counted"}
