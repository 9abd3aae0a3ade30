"""`method: clear`: labels over K + I classes, so that a model learns to say "this patch is the source, exactly".

Its options, its objective, what is logged of the gate, and what only this method does: sample edits while it trains,
and the gate's calibration when it is done.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from PIL import Image
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC

from thinkclearly.data.collator import Collator
from thinkclearly.data.splits import PreparedData, build_data
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.calibration import calibrate
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.cross_entropy import Scores
from thinkclearly.models.instruction_head import InstructionModel, read_clear_config, write_clear_config
from thinkclearly.models.load import Checkpoint
from thinkclearly.recipe import option
from thinkclearly.reporting.pictures import sheet
from thinkclearly.sequence import Dropout
from thinkclearly.training.callbacks import EpochOfDropout, SampleEdits, TuneClearWeight
from thinkclearly.training.options import Options
from thinkclearly.training.setup import build_model, new_config, stored_features
from thinkclearly.training.supervised import SupervisedTrainer

logger = logging.getLogger(__name__)


@dataclass
class ClearArguments:
    """The CLEAR objective and what is watched while training."""

    instructions: list[str] = option(["CLEAR"], "Instruction tokens to learn, the first that holds being the label.")
    clear_weight: float = option(
        0.3, "Class weight of instruction tokens in the loss; inference takes its logarithm off again."
    )
    tune_clear_weight: bool = option(False, "The original's auto-tuning: move the weight after each evaluation.")
    drop_all: float = option(0.1, "Share of rows that see neither picture nor words (trains the uncond row).")
    drop_source: float = option(0.5, "Share of the other rows that do not see the source codes (trains no_source).")
    clear_head_lr: float | None = option(None, "Learning rate of the CLEAR linear; learning_rate if not given.")
    sample_edits: int = option(4, "Held-out pictures that are edited and saved at each evaluation; 0 for none.")

    def __post_init__(self):
        if not 0 < self.clear_weight < math.inf:
            raise ValueError(f"clear_weight={self.clear_weight}; expected a positive number, 1 for no re-weighting")
        for name in ("drop_all", "drop_source"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected a share between 0 and 1")


Arguments = ClearArguments


class GateMeter:
    """Running rates of each instruction, code accuracy and gate AUC over the rows that see the source.

    The gate says copy or paint, so its AUC is that of any instruction against codes.

    Args:
        sync_on_compute: add up the processes' rows; off where each of them is given all rows.
    """

    def __init__(self, vocabulary: InstructionVocabulary, device: torch.device, sync_on_compute: bool = True):
        self.vocabulary = vocabulary
        rates = [f"{name.lower()}_rate_{kind}" for name in vocabulary.names for kind in ("true", "predicted")]
        means = (*rates, "copied", "code_accuracy", "accuracy")
        self.means = {name: MeanMetric(sync_on_compute=sync_on_compute).to(device) for name in means}
        self.auc = BinaryAUROC(thresholds=512, ignore_index=-1, sync_on_compute=sync_on_compute).to(device)

    @torch.no_grad()
    def update(self, scores: Scores, labels: torch.Tensor, sees_source: torch.Tensor) -> None:
        """Rows that do not see the source carry weight 0: a process without any still takes part in the sums."""
        copied, predicted = self.vocabulary.is_instruction(labels), scores.predicted
        counted = sees_source[:, None].expand_as(labels)
        for name in self.vocabulary.names:
            for kind, classes in (("true", labels), ("predicted", predicted)):
                says = self.vocabulary.says(classes, name)
                self.means[f"{name.lower()}_rate_{kind}"].update(says.float(), counted.float())
        self.means["copied"].update(copied.float(), counted.float())
        self.means["code_accuracy"].update((scores.code == labels).float(), (counted & ~copied).float())
        self.means["accuracy"].update((predicted == labels).float(), counted.float())
        # Any rising function gives the same area; a slow one keeps small probabilities apart on 512 thresholds.
        score = (scores.gate / 4).sigmoid()
        self.auc.update(score.flatten(), torch.where(counted, copied.long(), -1).flatten())

    def compute(self) -> dict[str, float]:
        """The values since the last call, and a fresh start; what was never seen is left out."""
        values = {name: float(metric.compute()) for name, metric in self.means.items()}
        if 0 < values.pop("copied") < 1:
            values["gate_auc"] = float(self.auc.compute())
        for metric in (*self.means.values(), self.auc):
            metric.reset()
        return {name: value for name, value in values.items() if not math.isnan(value)}


class ClearEditTrainer(SupervisedTrainer):
    """A `SupervisedTrainer` that also logs, for rows that see the source: true and predicted rate of each
    instruction, accuracy of the codes where a code is the label, accuracy over all classes, and the area under the
    gate's ROC curve.

    Args:
        clear_weight: class weight of instruction tokens; saved with the model, since inference takes it off again.
        clear_head_lr: learning rate of the CLEAR linear; the Trainer's `learning_rate` where not given.
        kwargs: `SupervisedTrainer`'s and the Trainer's own.
    """

    def __init__(self, model: InstructionModel, *, clear_weight: float, clear_head_lr: float | None = None, **kwargs):
        self.clear_head_lr = clear_head_lr
        super().__init__(model=model, instruction_weight=clear_weight, **kwargs)
        self.meters = {
            mode: GateMeter(model.vocabulary, self.args.device, mode == "train") for mode in ("train", "eval")
        }

    @property
    def clear_weight(self) -> float:
        return self.instruction_weight

    @clear_weight.setter
    def clear_weight(self, value: float) -> None:
        self.instruction_weight = value

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

    def measure(self, mode: str, scores: Scores, inputs: dict) -> None:
        sees_source = (inputs["known_slots"] >= 0).any(1)
        rows = scores.nll, scores.predicted, scores.code, scores.gate, inputs["labels"], sees_source
        if mode == "eval":
            rows = self.accelerator.gather_for_metrics(rows)
        *found, labels, sees_source = rows
        self.meters[mode].update(Scores(*found), labels, sees_source)

    def train_metrics(self) -> dict[str, float]:
        return {**self.meters["train"].compute(), "clear_weight": self.clear_weight}

    def eval_metrics(self) -> dict[str, float]:
        return self.meters["eval"].compute()

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.clear_config.clear_weight = self.clear_weight
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.clear_weight = read_clear_config(resume_from_checkpoint).clear_weight

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # here for DeepSpeed, which loads the model's weights by itself
            self.clear_weight = read_clear_config(checkpoint).clear_weight


Trainer = ClearEditTrainer


def instructions(options: Options) -> list[str]:
    """Instruction tokens of the model that `build` makes."""
    return options.method.instructions


def read_data(options: Options, checkpoint: Checkpoint) -> PreparedData:
    """Edits in three parts that share no picture."""
    return build_data(options.data, checkpoint, instructions=options.method.instructions)


def build(options: Options, checkpoint: Checkpoint, data: PreparedData, kind: type) -> ClearEditTrainer:
    """A trainer with the objective that the options describe."""
    clear = options.method
    config = new_config(checkpoint, options.settings, instructions=clear.instructions, clear_weight=clear.clear_weight)
    model = build_model(options, checkpoint, config)
    features = stored_features(options, model, checkpoint.processor, data)
    dropout = Dropout(clear.drop_all, clear.drop_source, options.training.seed)
    collator = Collator(checkpoint.processor, model.vocabulary, dropout, features)
    trainer = kind(
        model=model,
        processor=checkpoint.processor,
        clear_weight=clear.clear_weight,
        clear_head_lr=clear.clear_head_lr,
        data_collator=collator,
        args=options.training,
        train_dataset=data.train,
        eval_dataset=data.test,
        callbacks=[EpochOfDropout(collator)],
    )
    if clear.tune_clear_weight:
        trainer.add_callback(TuneClearWeight(trainer))
    if clear.sample_edits and has_pictures(data.test) and not trainer.weights_are_sharded:
        rows = data.test.select(range(min(clear.sample_edits, len(data.test))))
        trainer.add_callback(SampleEdits(lambda: draw_samples(model, checkpoint.processor, rows)))
    return trainer


def finish(trainer: ClearEditTrainer, data: PreparedData) -> dict[str, float]:
    """Calibrates what was trained and saved on the records held out for it; what came of it."""
    if data.calibration is None:
        return {}
    if trainer.weights_are_sharded or not has_pictures(data.calibration):
        why = "its weights are sharded" if trainer.weights_are_sharded else "no held-out records with pictures"
        logger.warning("The gate stays uncalibrated: %s; `thinkclearly calibrate` does it later", why)
        return {}
    found = {}
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).eval()
        model.clear_config.clear_weight = trainer.clear_weight
        try:
            editor = Editor(model, trainer.processor)
            found = calibrate(editor, data.calibration, trainer.args.per_device_eval_batch_size)
            write_clear_config(model.clear_config, trainer.args.output_dir)
        except (ValueError, torch.OutOfMemoryError) as error:  # nothing to fit; `thinkclearly calibrate` does it later
            logger.warning("The gate stays uncalibrated: %s", error)
    trainer.accelerator.wait_for_everyone()
    return found


def has_pictures(rows: Dataset | None) -> bool:
    """Whether there are prepared records, with the source pictures beside their tokens."""
    return rows is not None and "source" in rows.column_names


def draw_samples(model: InstructionModel, processor, rows: Dataset) -> Image.Image:
    """A sheet of source, raw, composite and mask for a few prepared rows, with the model as it is now."""
    was_training = model.training
    results = Editor(model, processor).edit_many(list(rows["source"]), list(rows["instruction"]))
    model.train(was_training)
    return sheet(
        [
            [
                (r.source, r.instruction),
                (r.raw, "raw"),
                (r.image, "composite"),
                (r.mask, f"{r.clear_fraction:.0%} CLEAR"),
            ]
            for r in results
        ]
    )
