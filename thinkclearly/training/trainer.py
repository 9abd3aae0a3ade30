"""ClearEditTrainer: transformers' Trainer with weighted cross-entropy over K + I classes.

Knows how the loss is counted, logged, saved and resumed. Does not know where data or pictures come from.
"""

from __future__ import annotations

import math
import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC

from thinkclearly.data.collator import EditCollator
from thinkclearly.files import replacing_in
from thinkclearly.models.clear_head import ClearEditModel, read_clear_config
from thinkclearly.models.prompt import ClearEditProcessor
from thinkclearly.models.scores import Scores
from thinkclearly.training.adapters import load_finetune
from thinkclearly.training.checkpoints import ResumableTrainer


def class_weights(labels: torch.Tensor, codebook_size: int, clear_weight: float) -> torch.Tensor:
    """Weight of each label: `clear_weight` for instructions, 1 for codes; float32, the shape of `labels`."""
    return torch.where(labels >= codebook_size, clear_weight, 1.0)


def weighted_loss(
    nll: torch.Tensor,
    labels: torch.Tensor,
    codebook_size: int,
    clear_weight: float,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Class-weighted cross-entropy, divided by the sum of the weights, as torch's own weighted mean is.

    Args:
        nll: float32 (B, N), negative log-likelihood of the labels.
        labels: long (B, N).
        total: sum of weights to divide by; that of these labels where not given. With gradient accumulation or
            several processes it is the sum over the whole optimizer step.
    """
    weights = class_weights(labels, codebook_size, clear_weight)
    return (nll * weights).sum() / (weights.sum() if total is None else total)


class GateMeter:
    """Running CLEAR rates, code accuracy and gate AUC over the rows that see the source.

    Args:
        sync_on_compute: add up the processes' rows; off where each of them is given all rows.
    """

    def __init__(self, codebook_size: int, device: torch.device, sync_on_compute: bool = True):
        self.codebook_size = codebook_size
        means = ("clear_rate_true", "clear_rate_predicted", "code_accuracy", "accuracy")
        self.means = {name: MeanMetric(sync_on_compute=sync_on_compute).to(device) for name in means}
        self.auc = BinaryAUROC(thresholds=512, ignore_index=-1, sync_on_compute=sync_on_compute).to(device)

    @torch.no_grad()
    def update(self, scores: Scores, labels: torch.Tensor, sees_source: torch.Tensor) -> None:
        """Rows that do not see the source carry weight 0: a process without any still takes part in the sums."""
        clear, predicted = labels >= self.codebook_size, scores.predicted
        counted = sees_source[:, None].expand_as(labels)
        self.means["clear_rate_true"].update(clear.float(), counted.float())
        self.means["clear_rate_predicted"].update((predicted >= self.codebook_size).float(), counted.float())
        self.means["code_accuracy"].update((scores.code == labels).float(), (counted & ~clear).float())
        self.means["accuracy"].update((predicted == labels).float(), counted.float())
        # Any rising function gives the same area; a slow one keeps small probabilities apart on 512 thresholds.
        score = (scores.gate / 4).sigmoid()
        self.auc.update(score.flatten(), torch.where(counted, clear.long(), -1).flatten())

    def compute(self) -> dict[str, float]:
        """The values since the last call, and a fresh start; what was never seen is left out."""
        values = {name: float(metric.compute()) for name, metric in self.means.items()}
        if 0 < values["clear_rate_true"] < 1:
            values["gate_auc"] = float(self.auc.compute())
        for metric in (*self.means.values(), self.auc):
            metric.reset()
        return {name: value for name, value in values.items() if not math.isnan(value)}


class ClearEditTrainer(ResumableTrainer):
    """Fine-tunes a `ClearEditModel`.

    Besides the loss it logs, for rows that see the source: true and predicted CLEAR rate, accuracy of the codes where
    a code is the label, accuracy over all classes, and the area under the gate's ROC curve. Evaluation counts every
    record once, so its numbers are the same for any batch size and number of processes.

    Args:
        model: with LoRA inside, or bare for full fine-tuning.
        processor: saved beside every checkpoint.
        clear_weight: class weight of instruction tokens; callbacks may move it. The evaluation loss keeps this one, so
            that its values can be compared.
        data_collator: with condition dropout; evaluation uses the same without dropout.
        clear_head_lr: learning rate of the CLEAR linear; the Trainer's `learning_rate` where not given.
        kwargs: the Trainer's own.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: ClearEditModel,
        processor: ClearEditProcessor,
        clear_weight: float,
        data_collator: EditCollator,
        clear_head_lr: float | None = None,
        **kwargs,
    ):
        self.clear_head_lr = clear_head_lr
        super().__init__(model=model, data_collator=data_collator, **kwargs)
        self.processor = processor
        self.clear_weight = self.eval_clear_weight = clear_weight
        self.eval_collator = EditCollator(processor, model.vocabulary, features=data_collator.features)
        self.codebook_size = model.vocabulary.codebook_size
        self.train_meter = GateMeter(self.codebook_size, self.args.device)
        self.eval_meter = GateMeter(self.codebook_size, self.args.device, sync_on_compute=False)

    @property
    def weights_are_sharded(self) -> bool:
        """Whether no process has the weights whole (FSDP, ZeRO-3), as editing, which is outside `forward`, needs."""
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3)

    def create_accelerator_and_postprocess(self):
        # accelerate shards over every kind of device but the CPU, where it would run DDP without a word.
        state = PartialState._shared_state
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state["distributed_type"] == DistributedType.MULTI_CPU:
            state["distributed_type"] = DistributedType.MULTI_XPU
        super().create_accelerator_and_postprocess()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Sum of class weights over all micro-batches and processes of one optimizer step."""
        weights = [class_weights(b["labels"], self.codebook_size, self.clear_weight).sum() for b in batch_samples]
        total = torch.stack(weights).sum().to(device) if weights else torch.zeros((), device=device)
        return self.accelerator.gather(total).sum()

    def create_optimizer(self, *args, **kwargs):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.clear_head_lr is not None:
            head = list(self.accelerator.unwrap_model(self.model).clear_head.parameters())
            ids = {id(p) for p in head}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.add_param_group({"params": head, "lr": self.clear_head_lr, "weight_decay": 0.0})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a training step; evaluation has sums of its own, see `prediction_step`."""
        scores, labels = model(**inputs), inputs["labels"]
        loss = weighted_loss(scores.nll, labels, self.codebook_size, self.clear_weight, num_items_in_batch)
        self.train_meter.update(scores, labels, inputs["source_slot"] >= 0)
        # Processes average their gradients; the sum of weights is already the global one.
        loss = self.accelerator.num_processes * loss
        return (loss, scores) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Adds the rows of all processes to the sums, without the duplicates that fill up the last batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            scores = model(**inputs)
        rows = (*scores.to_tuple(), inputs["labels"], inputs["source_slot"] >= 0)
        *scores, labels, sees_source = self.accelerator.gather_for_metrics(rows)
        scores = Scores(*scores)
        self.eval_meter.update(scores, labels, sees_source)
        weights = class_weights(labels, self.codebook_size, self.eval_clear_weight)
        self.eval_sums += torch.stack([(scores.nll * weights).sum(), weights.sum()])
        return None, None, None

    def get_eval_dataloader(self, eval_dataset=None):
        training, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self.eval_sums = torch.zeros(2, device=self.args.device)  # of the losses, and of the weights
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, weight = self.eval_sums.tolist()
        found = {"loss": loss / weight, **self.eval_meter.compute()}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = {**logs, **self.train_meter.compute(), "clear_weight": self.clear_weight}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        if not self.args.should_save:
            return
        directory = output_dir or self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.clear_config.clear_weight = self.clear_weight
        with replacing_in(directory) as folder:  # what is being pushed stays what it was
            model.save_pretrained(folder, state_dict=state_dict)
            self.processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.clear_weight = read_clear_config(resume_from_checkpoint).clear_weight
            return
        model = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        load_finetune(model, resume_from_checkpoint)
        self.clear_weight = model.clear_config.clear_weight

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # here for DeepSpeed, which loads the model's weights by itself
            self.clear_weight = read_clear_config(checkpoint).clear_weight

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
