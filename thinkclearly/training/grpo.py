"""`method: grpo`: a model learns from rewards of what it draws, compared within groups of its own samples.

GRPO for pictures, and Pair-GRPO: both prompts of a pair that differs in one thing share a group, with ground truth
among the samples while training is young (FocusDiff, arXiv 2506.05501). With `task: edit` the samples are edits, and
whether a patch is copied is drawn and learnt as well. Option names are TRL's where it has the option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from thinkclearly.data.splits import PreparedData, build_prompts, build_rewarded_edits
from thinkclearly.editing.settings import EditSettings
from thinkclearly.models.load import Checkpoint
from thinkclearly.recipe import check_choice, option
from thinkclearly.training.grpo_trainer import GrpoTrainer
from thinkclearly.training.options import Options
from thinkclearly.training.policy_gradient import SCALES
from thinkclearly.training.rewards import load_rewards
from thinkclearly.training.setup import adapter_config, build_model, new_config

LOGPROB_SCALES = ("exact", "div_w", "cond")


@dataclass
class GrpoArguments:
    """GRPO: what is drawn, how it is rewarded, and how far a step may go."""

    task: str = option("draw", "draw: pictures from prompts; edit: edits of pictures, with the gate sampled.")
    prompts_path: str | None = option(None, "draw: a text file with further prompts, one a line.")
    reward_funcs: list[str] = option(
        [], "Rewards: vqa:MODEL, clip:MODEL, http:URL; shapes or shape_edits, the task's, if none is given."
    )
    reward_weights: list[float] = option([], "Weight of each reward; 1 if not given.")
    own_rewards: list[str] = option([], "Rewards of your own, module:function; on the command line only.")
    num_generations: int = option(7, "Samples of a prompt, ground truth included.")
    pair_groups: bool = option(True, "Compare the samples of both prompts of a pair in one group (Pair-GRPO).")
    num_iterations: int = option(1, "Optimizer steps on the same samples.")
    beta: float = option(0.04, "Weight of the distance from the model that training began with.")
    epsilon: float = option(0.2, "How far a choice's probability ratio may fall below 1 and still be learnt from.")
    epsilon_high: float | None = option(None, "How far it may rise above 1; epsilon if not given.")
    scale_rewards: str = option("group", "Advantages over the group's or the batch's standard deviation, or none.")
    logprob_scale: str = option(
        "exact", "exact: what was drawn from; div_w: guided logits over w, the original's; cond: without guidance."
    )
    truth_steps: list[int] = option([50, 450, 1200], "Steps between which the chance of ground truth is linear.")
    truth_shares: list[float] = option([1.0, 0.25, 0.0], "The chance at each of them that a record shows it.")
    lr_drop_steps: int = option(0, "Step by which the learning rate has fallen to lr_drop_to; 0: lr_scheduler_type.")
    lr_drop_to: float = option(2e-6, "Learning rate at lr_drop_steps, reached from the peak after warmup_steps.")
    lr_end: float = option(2e-7, "Learning rate at the last step, after lr_drop_steps.")
    rows_per_forward: int = option(0, "Samples in one forward and backward pass; 0 for all of a batch.")
    sample_sheets: bool = option(True, "Save pictures and rewards of a batch at each logging step.")

    def __post_init__(self):
        check_choice("task", self.task, ("draw", "edit"))
        check_choice("scale_rewards", self.scale_rewards, SCALES)
        check_choice("logprob_scale", self.logprob_scale, LOGPROB_SCALES)
        if self.num_generations < 2:
            raise ValueError(f"num_generations={self.num_generations}; expected 2 or more, which are compared")
        if self.num_iterations < 1 or self.rows_per_forward < 0:
            raise ValueError("num_iterations must be 1 or more, rows_per_forward 0 or more")
        for name in ("beta", "epsilon", "epsilon_high"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}; expected 0 or more")
        if not self.reward_funcs and not self.own_rewards:
            self.reward_funcs = ["shape_edits" if self.task == "edit" else "shapes"]
        rewards = len(self.reward_funcs) + len(self.own_rewards)
        if self.reward_weights and len(self.reward_weights) != rewards:
            raise ValueError(f"{rewards} rewards and {len(self.reward_weights)} reward_weights; give one for each")
        if len(self.truth_steps) != len(self.truth_shares) or self.truth_steps != sorted(self.truth_steps):
            raise ValueError("truth_steps and truth_shares: expected as many shares as steps, the steps rising")


Arguments, Trainer = GrpoArguments, GrpoTrainer


def instructions(options: Options) -> list[str]:
    """Those of the fine-tune that training starts from: GRPO teaches no new ones."""
    found = adapter_config(options)
    return found.instructions if found else []


def read_data(options: Options, checkpoint: Checkpoint) -> PreparedData:
    """Prompts, or edits with their pictures, in two parts that share none."""
    blind = {"shapes", "shape_edits"}.intersection(options.method.reward_funcs)
    if blind and options.data.source != "shapes":
        raise ValueError(
            f"reward {', '.join(blind)} judges the built-in shapes alone, not source: {options.data.source}; give "
            "reward_funcs (vqa:MODEL, clip:MODEL, http:URL) or --own_rewards module:function"
        )
    if options.method.task == "edit":
        return build_rewarded_edits(options.data)
    return build_prompts(options.data, options.method.prompts_path)


def build(options: Options, checkpoint: Checkpoint, data: PreparedData, kind: type) -> GrpoTrainer:
    """A trainer with the objective that the options describe."""
    grpo = options.method
    config = adapter_config(options) or new_config(checkpoint, options.settings, instructions=[])
    config.edit = config.edit | options.settings
    model = build_model(options, checkpoint, config)
    rewards = load_rewards(grpo.reward_funcs, options.training.device, own=grpo.own_rewards)
    return kind(
        model=model,
        processor=checkpoint.processor,
        grpo=grpo,
        settings=replace(EditSettings(), **model.clear_config.edit),
        rewards=rewards,
        args=options.training,
        train_dataset=data.train,
        eval_dataset=data.test,
    )


def finish(trainer: GrpoTrainer, data: PreparedData) -> dict[str, float]:
    """Nothing is left to do."""
    return {}
