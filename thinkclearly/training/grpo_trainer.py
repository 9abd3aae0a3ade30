"""GrpoTrainer: draws, rewards, and learns from samples in comparison with their group.

Knows the order of a step, what is logged, and what a checkpoint keeps. The formulas are `policy_gradient`'s, the
samples `rollouts`'s. Does not know where records and rewards come from.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from thinkclearly.decoding.engine import guided_rows
from thinkclearly.decoding.policy import Actions, Policy
from thinkclearly.editing.settings import EditSettings
from thinkclearly.files import replacing
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.reporting.pictures import sheet
from thinkclearly.sequence import FULL
from thinkclearly.training.base import ModelTrainer
from thinkclearly.training.policy_gradient import combined_rewards, distance, group_advantages, surrogate
from thinkclearly.training.rollouts import Rollout, Stopwatch, draw_samples, edit_samples, judge

SHOWN = 6  # samples of a prompt on the sheet


class GrpoTrainer(ModelTrainer):
    """Draws, rewards, and learns from the samples of a record in comparison.

    Two processes learn as one does with twice the batch: noise and ground truth are keyed to the record. The reference
    is the trained weights as they were at the start, swapped in where they are needed.

    Args:
        grpo: its options, `grpo.GrpoArguments`.
        settings: how to draw; training is for what is drawn so.
        rewards: name → function, TRL's convention: `f(prompts, completions, **columns)` → a number for each sample,
            None where it does not apply.
        kwargs: `ModelTrainer`'s and the Trainer's own. Data sets are `data.pairs.PROMPTS`, or photo pairs to edit.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: InstructionModel,
        *,
        grpo,
        settings: EditSettings,
        rewards: dict[str, Callable],
        **kwargs,
    ):
        super().__init__(model=model, data_collator=list, **kwargs)
        self.grpo, self.rewards = grpo, rewards
        self.weights = dict(zip(rewards, grpo.reward_weights or [1.0] * len(rewards)))
        self.edits = grpo.task == "edit"
        self.settings = replace(settings, sample_gate=self.edits and len(model.vocabulary) > 0)
        _check_settings(self.settings, grpo, len(model.vocabulary))
        rows = guided_rows(self.settings, has_source=self.edits)
        scale = self.settings.cfg_weight if grpo.logprob_scale == "div_w" and len(rows) > 1 else 1.0
        rows = {FULL: 1.0} if grpo.logprob_scale == "cond" else rows
        self.policy = Policy(self.settings, rows, scale, copies=self.settings.sample_gate)
        self._check_launch()
        self.rollouts: list[Rollout] = []
        self.start: list[torch.Tensor] = []
        self.resumed: Path | None = None
        self.watch = Stopwatch(self.args.device)
        self.meters: dict[str, MeanMetric] = {}

    def _check_launch(self) -> None:
        if self.weights_are_sharded and not self.accelerator.is_fsdp2:
            raise ValueError(
                "grpo draws with whole weights, which ZeRO-3 and FSDP1 do not give; use FSDP2, DDP or ZeRO-2"
            )
        if self.weights_are_sharded and self.grpo.rows_per_forward:
            raise ValueError(
                "rows_per_forward under FSDP2: processes with other numbers of samples would wait; give 0"
            )

    # ---- samples -------------------------------------------------------------------------------------------------

    @property
    def cycle(self) -> int:
        """Number of the samples that are learnt from: they last for `num_iterations` steps."""
        return self.state.global_step // self.grpo.num_iterations

    @property
    def iteration(self) -> int:
        """How often they have been learnt from before."""
        return self.state.global_step % self.grpo.num_iterations

    def roll_out(self, records: list[dict], count: int, seed: int, with_truth: Callable[[str], bool]) -> Rollout:
        """Samples of some records, with their rewards."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).eval()
        arguments = (model, self.processor, records, self.settings, count, seed)
        with self.compute_loss_context_manager():
            if self.edits:
                rollout = edit_samples(*arguments, self.watch)
            else:
                rollout = draw_samples(*arguments, with_truth, self.watch)
            if not self.grpo.pair_groups:
                rollout.groups = rollout.prompt_numbers
        with self.watch("reward"):
            judge(rollout, self.rewards)
        return rollout

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The samples of an optimizer step, drawn when the last ones have been learnt from often enough."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.iteration and not self.rollouts:
            self._draw(batches)  # as they were, and what was logged of them then is not logged again
            self._restore()
            for meter in self.meters.values():
                meter.reset()
        elif not self.iteration:
            self._draw(batches)
        return self.rollouts, count

    def _draw(self, batches: list[list[dict]]) -> None:
        step, steps = self.cycle * self.grpo.num_iterations, self.grpo.truth_steps
        chance = np.interp(step, steps, self.grpo.truth_shares) if steps else 0.0
        seed = int(np.random.SeedSequence((self.args.seed, self.cycle)).generate_state(1)[0])

        def with_truth(key: str) -> bool:
            return np.random.default_rng((seed, *key.encode())).random() < chance

        with self.whole_weights():
            self.rollouts = [self.roll_out(batch, self.grpo.num_generations, seed, with_truth) for batch in batches]
        self._compare()

    def _compare(self) -> None:
        """Advantages, and what is logged of the rewards."""
        combined = [combined_rewards(rollout.rewards, self.weights) for rollout in self.rollouts]
        spread = None
        if self.grpo.scale_rewards == "batch":
            spread = float(np.std(_valid(gather_object(torch.cat(combined).tolist())), ddof=1))
        for rollout, rewards in zip(self.rollouts, combined):
            rollout.advantages = group_advantages(rewards, rollout.groups, self.grpo.scale_rewards, spread)
            drawn = torch.tensor([not truth for truth in rollout.truths], device=rewards.device)
            functions = {f"rewards/{name}": each for name, each in rollout.rewards.items()}
            for name, each in {"reward": rewards, **functions}.items():
                self._note(name, each, drawn & ~each.isnan())
                found = [each[(rollout.groups == group) & ~each.isnan()] for group in rollout.groups.unique()]
                spreads = [some.std().item() for some in found if len(some) > 1]
                self._note(f"{name}_std", torch.tensor(spreads, device=each.device))  # noted by every process
            self._note("truth_share", (~drawn).float())
            self._note("equal_rewards", (rollout.advantages == 0).float())

    # ---- the loss ------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Samples of all micro-batches and processes of one optimizer step."""
        prompts = sum(len(record.get("prompts", (1,))) for batch in batch_samples for record in batch)
        return self.accelerator.gather(torch.tensor(prompts * self.grpo.num_generations, device=device)).sum()

    def training_step(self, model, rollout: Rollout, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward over a batch's samples, `rows_per_forward` at a time."""
        model.train()
        pieces = torch.arange(len(rollout), device=self.args.device).split(self.grpo.rows_per_forward or len(rollout))
        total, last = torch.zeros((), device=self.args.device), self.accelerator.sync_gradients
        for index in pieces:
            # Gradients are exchanged, and DeepSpeed takes its step, with the last piece's.
            self.accelerator.gradient_state._set_sync_gradients(last and index is pieces[-1])
            with self.accelerator.no_sync(model) if index is not pieces[-1] else nullcontext():
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, (rollout, index), num_items_in_batch=num_items_in_batch)
                with self.watch("backward"):
                    self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The clipped surrogate and the distance, averaged over positions, then over all samples of the step."""
        rollout, index = inputs
        batch = rollout.model_inputs(index, self.processor, self.policy.rows)
        reference = self._reference_logps(model, rollout, index, batch) if self.grpo.beta else None
        with self.watch("forward"):
            actions: Actions = model(**batch, score=self.policy)
        logps = actions.logps
        old = self._old_logps(rollout, index, logps)
        high = self.grpo.epsilon if self.grpo.epsilon_high is None else self.grpo.epsilon_high
        found = surrogate(logps, old, rollout.advantages[index], self.grpo.epsilon, high)
        per_choice = found.loss
        if reference is not None:
            kl = distance(logps, reference)
            per_choice = per_choice + self.grpo.beta * kl
            self._note("kl", kl)
        # Processes average their gradients; the number of samples is already the global one.
        loss = self.accelerator.num_processes * per_choice.mean(1).sum() / num_items_in_batch
        if not loss.isfinite():
            raise ValueError(
                f"Step {self.state.global_step}: the loss is {loss.item()}. Training stops; checkpoints before it are "
                "whole. Lower learning_rate or max_grad_norm, or raise beta."
            )
        self._note("clip_ratio", found.clipped)
        self._note("entropy", actions.entropy)
        drifts = (logps - rollout.logps[index]).abs()
        if self.grpo.logprob_scale == "exact":
            self._note("logp_difference", drifts, ~drifts.isnan())
        return (loss, actions) if return_outputs else loss

    def _old_logps(self, rollout: Rollout, index: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
        """When the samples were first learnt from; not the decoder's, which differ by rounding."""
        if self.grpo.num_iterations == 1:
            return logps.detach()
        if rollout.old_logps is None:
            rollout.old_logps = torch.full(rollout.class_ids.shape, math.nan, device=logps.device)
        if self.iteration == 0:
            rollout.old_logps[index] = logps.detach()
        return rollout.old_logps[index]

    def _reference_logps(self, model, rollout: Rollout, index: torch.Tensor, batch: dict) -> torch.Tensor:
        if rollout.reference_logps is None:
            rollout.reference_logps = torch.full(rollout.class_ids.shape, math.nan, device=self.args.device)
        if self.iteration == 0:
            model.eval()
            with self.watch("reference"), self.reference(model), torch.no_grad():
                rollout.reference_logps[index] = model(**batch, score=self.policy).logps
            model.train()
        return rollout.reference_logps[index]

    @contextmanager
    def reference(self, model):
        """The weights that training began with, for the length of the block."""
        self._keep_start(model)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def swap() -> None:
            for module in self.sharded_modules():
                module.reshard()  # what a forward pass gathered and left
            for parameter, kept in zip(learning, self.start):
                now = parameter.data.clone()
                parameter.data.copy_(kept)
                kept.copy_(now)

        swap()
        try:
            yield
        finally:
            swap()

    def _keep_start(self, model) -> None:
        if not self.start and self.grpo.beta:
            self.start = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def floating_point_ops(self, inputs) -> int:
        """Not counted: the Trainer would look for token ids among its inputs."""
        return 0

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        grpo, args = self.grpo, self.args
        if not grpo.lr_drop_steps:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            steps = [0, args.get_warmup_steps(num_training_steps), grpo.lr_drop_steps, num_training_steps]
            rates = [0.0, args.learning_rate, grpo.lr_drop_to, grpo.lr_end]

            def factor(step: int) -> float:
                return float(np.interp(step, steps, rates)) / args.learning_rate

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean rewards of one sample for each held-out prompt, the same noise each time."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        process, processes, size = self.args.process_index, self.args.world_size, self.args.per_device_eval_batch_size
        mine = rows.select(range(process, len(rows), processes))
        found: dict[str, list[float]] = {name: [] for name in ("reward", *self.rewards)}
        with self.whole_weights():
            for start in range(0, len(mine), size):
                batch = [mine[i] for i in range(start, min(start + size, len(mine)))]
                rollout = self.roll_out(batch, 1, self.args.seed, lambda key: False)
                for name, values in rollout.rewards.items():
                    found[name] += values.tolist()
                if rollout.rewards:
                    found["reward"] += combined_rewards(rollout.rewards, self.weights).tolist()
        self.watch.take()
        metrics = {}
        for name, values in found.items():
            if len(values := _valid(gather_object(values))):
                key = name if name == "reward" else f"rewards/{name}"
                metrics[f"{metric_key_prefix}_{key}"] = float(np.mean(values))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- logs, checkpoints ---------------------------------------------------------------------------------------

    def _note(self, name: str, values: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        meter = self.meters.setdefault(name, MeanMetric().to(self.args.device))
        values = values.detach().float()
        values = values if counted is None else values[counted]
        if values.numel():
            meter.update(values)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            with warnings.catch_warnings(action="ignore"):  # of a meter that was given nothing
                values = {name: float(self.meters[name].compute()) for name in sorted(self.meters)}
            logs |= {name: value for name, value in values.items() if value == value}
            for meter in self.meters.values():
                meter.reset()
            logs |= {f"seconds/{stage}": seconds for stage, seconds in self.watch.take().items()}
            if self.grpo.sample_sheets and self.rollouts and self.is_world_process_zero():
                self._save_sheet()
        super().log(logs, *args, **kwargs)

    def _save_sheet(self) -> None:
        rollout, path = self.rollouts[0], Path(self.args.output_dir) / "samples"
        rewards = combined_rewards(rollout.rewards, self.weights).tolist() if rollout.rewards else None
        lines = {}
        for i, words in enumerate(rollout.prompts):
            text = f"{words}\n{'' if rewards is None else f'{rewards[i]:.3f}'} {rollout.truths[i]}".rstrip()
            lines.setdefault(words, []).append((rollout.pictures[i].convert("RGB"), text))
        with replacing(path / f"step_{self.state.global_step:06d}.png") as temporary:
            sheet([line[-SHOWN:] for line in lines.values()][:8]).save(temporary, format="PNG")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._keep_start(self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False))
        self.resumed = Path(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.iteration:  # the samples go on being learnt from
            names = ("class_ids", "advantages", "old_logps", "reference_logps")
            kept = {
                f"{i}.{name}": getattr(rollout, name).contiguous()
                for i, rollout in enumerate(self.rollouts)
                for name in names
                if getattr(rollout, name) is not None
            }
            save_file(kept, self._samples_file(output_dir))
        super()._save_rng_state(output_dir)

    def _restore(self) -> None:
        for name, tensor in load_file(self._samples_file(self.resumed)).items():
            number, _, field = name.partition(".")
            setattr(self.rollouts[int(number)], field, tensor.to(self.args.device))

    def _samples_file(self, directory: str | Path) -> Path:
        return Path(directory) / f"samples_{self.args.process_index}.safetensors"

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if self.grpo.num_iterations == 1:
            return sampler
        block = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return RepeatedBlocks(self, len(train_dataset or self.train_dataset), block, self.grpo.num_iterations)


class RepeatedBlocks(torch.utils.data.Sampler):
    """Every optimizer step's records several times in a row; an incomplete last block is left out.

    Args:
        trainer: its state says which epoch it is, also after a resumption; its seed keys the order.
    """

    def __init__(self, trainer: GrpoTrainer, size: int, block: int, times: int):
        if size < block:
            raise ValueError(f"{size} records are fewer than the {block} of one optimizer step; add records")
        self.trainer, self.size, self.block, self.times = trainer, size, block, times

    def __len__(self) -> int:
        return self.size // self.block * self.block * self.times

    def __iter__(self):
        epoch = int(self.trainer.state.epoch or 0)
        order = np.random.default_rng((self.trainer.args.seed, epoch)).permutation(self.size)
        for start in range(0, self.size - self.block + 1, self.block):
            for _ in range(self.times):
                yield from order[start : start + self.block].tolist()


def _valid(values: list[float]) -> list[float]:
    return [value for value in values if value == value]


def _check_settings(settings: EditSettings, grpo, instructions: int) -> None:
    if settings.temperature == 0 or settings.top_k or settings.top_p < 1:
        raise ValueError(
            f"temperature={settings.temperature}, top_k={settings.top_k}, top_p={settings.top_p}: grpo learns from "
            "the whole distribution that it draws from; give a temperature above 0, top_k=0 and top_p=1"
        )
    if grpo.task == "edit" and instructions > 1:
        raise ValueError(f"task=edit with {instructions} instruction tokens: which one holds is not drawn; give one")
