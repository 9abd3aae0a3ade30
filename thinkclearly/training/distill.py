"""`method: distill`: one row learns what guided rows draw, so that a picture or an edit needs half the rows or fewer.

The teacher is the model that training starts from, under the guidance that the recipe names; the pupil is the same
model without guidance. Guidance distillation as in arXiv 2210.03142, for codes instead of noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from thinkclearly.data.splits import PreparedData
from thinkclearly.decoding.guidance import guide
from thinkclearly.decoding.policy import operating_point
from thinkclearly.editing.settings import EditSettings
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.load import Checkpoint
from thinkclearly.recipe import check_choice, option
from thinkclearly.sequence import FULL
from thinkclearly.training import grpo
from thinkclearly.training.grpo_trainer import GrpoTrainer
from thinkclearly.training.options import Options
from thinkclearly.training.rewards import load_rewards
from thinkclearly.training.setup import adapter_config, build_model, new_config


@dataclass
class DistillArguments:
    """Guidance distillation; cfg_weight, cfg_weight2 and temperature are the teacher's."""

    task: str = option("draw", "draw: pictures from prompts; edit: edits of pictures.")
    prompts_path: str | None = option(None, "draw: a text file with further prompts, one a line.")
    reward_funcs: list[str] = option([], "Measured at evaluations: shapes, shape_edits, vqa:MODEL, clip:MODEL.")
    num_generations: int = option(1, "Pictures that the teacher draws of a prompt, or edits of a picture.")
    rows_per_forward: int = option(0, "Samples in one forward and backward pass; 0 for all of a batch.")
    sample_sheets: bool = option(True, "Save what the teacher drew at each logging step.")

    # What else the trainer asks for is nothing to choose: samples are new at every step, and none is ground truth.
    num_iterations, beta, logprob_scale, reward_weights, truth_steps, lr_drop_steps = 1, 1.0, "exact", (), (), 0
    pair_groups = True

    def __post_init__(self):
        check_choice("task", self.task, ("draw", "edit"))
        if self.num_generations < 1 or self.rows_per_forward < 0:
            raise ValueError("num_generations must be 1 or more, rows_per_forward 0 or more")


@dataclass
class Distribution(ModelOutput):
    """Of C samples with N positions.

    Attributes:
        codes: float32 (C, N, K), log-probabilities of the codes.
        gate: float32 (C, N), log-odds of copying; None where nothing is copied.
    """

    codes: torch.Tensor | None = None
    gate: torch.Tensor | None = None


@dataclass(frozen=True)
class WholeDistribution:
    """The `score` of `InstructionModel.forward` that gives what would be drawn from, under `rows`."""

    settings: EditSettings
    rows: dict[str, float]
    copies: bool

    def __call__(self, model: InstructionModel, hidden: torch.Tensor, labels: torch.Tensor) -> Distribution:
        logits = model.logits(hidden).unflatten(0, (-1, len(self.rows)))  # (C, R, N, K + I)
        rows = dict(zip(self.rows, logits.unbind(1)))
        codes = guide(rows, self.rows)[..., : model.vocabulary.codebook_size] / self.settings.temperature
        gate = operating_point(model.gate(rows[FULL]), self.settings) if self.copies else None
        return Distribution(F.log_softmax(codes, dim=-1), gate)


class DistillTrainer(GrpoTrainer):
    """Draws by the teacher and pulls the pupil's distribution to the teacher's at every position drawn.

    Args:
        grpo: `DistillArguments`; the name is the parent's.
        kwargs: `GrpoTrainer`'s.
    """

    def __init__(self, model: InstructionModel, **kwargs):
        super().__init__(model, **kwargs)
        self.pupil_settings = replace(self.settings, cfg_weight=1.0, cfg_weight2=0.0)

    def _draw(self, batches: list[list[dict]]) -> None:
        with self.reference(self.model):
            super()._draw(batches)

    def _compare(self) -> None:
        """Nothing is compared."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """KL(teacher, pupil) of the codes where paint was drawn and of the gate everywhere, in nats a position."""
        rollout, index = inputs
        copies = self.settings.sample_gate
        score = WholeDistribution(self.settings, self.policy.rows, copies)
        batch = rollout.model_inputs(index, self.processor, self.policy.rows)
        with self.watch("reference"), self.reference(model), torch.no_grad():
            teacher: Distribution = model(**batch, score=score)
        with self.watch("forward"):
            batch = rollout.model_inputs(index, self.processor, [FULL])
            pupil: Distribution = model(**batch, score=WholeDistribution(self.settings, {FULL: 1.0}, copies))
        vocabulary = self.accelerator.unwrap_model(model, keep_torch_compile=False).vocabulary
        painted = ~vocabulary.is_instruction(rollout.class_ids[index])
        kl = F.kl_div(pupil.codes, teacher.codes, reduction="none", log_target=True).sum(-1) * painted
        self._note("kl_codes", kl, painted)
        if copies:
            gates = _gate_kl(teacher.gate, pupil.gate)
            self._note("kl_gate", gates)
            kl = kl + gates
        loss = self.accelerator.num_processes * kl.mean(1).sum() / num_items_in_batch
        return (loss, pupil) if return_outputs else loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Rewards of what the pupil draws without guidance."""
        teacher, self.settings = self.settings, self.pupil_settings
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.settings = teacher


def _gate_kl(teacher: torch.Tensor, pupil: torch.Tensor) -> torch.Tensor:
    """KL of two coins by their log-odds, the same shape."""
    cross = F.binary_cross_entropy_with_logits(pupil, teacher.sigmoid(), reduction="none")
    return cross - F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="none")


Arguments, Trainer = DistillArguments, DistillTrainer
instructions, read_data = grpo.instructions, grpo.read_data


def build(options: Options, checkpoint: Checkpoint, data: PreparedData, kind: type) -> DistillTrainer:
    """A trainer with the teacher that the options describe; its checkpoints decode one row."""
    config = adapter_config(options) or new_config(checkpoint, options.settings, instructions=[])
    settings = replace(EditSettings(), **(config.edit | options.settings))
    config.edit = config.edit | options.settings | {"cfg_weight": 1.0, "cfg_weight2": 0.0}
    return kind(
        model=build_model(options, checkpoint, config),
        processor=checkpoint.processor,
        grpo=options.method,
        settings=settings,
        rewards=load_rewards(options.method.reward_funcs, options.training.device),
        args=options.training,
        train_dataset=data.train,
        eval_dataset=data.test,
    )


def finish(trainer: DistillTrainer, data: PreparedData) -> dict[str, float]:
    """Nothing is left to do."""
    return {}
