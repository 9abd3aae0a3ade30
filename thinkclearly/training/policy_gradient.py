"""The formulas of GRPO: advantages within a group, the clipped surrogate, and the distance from a reference.

Tensors in, tensors out. Knows no model and no trainer.
Sources: DeepSeekMath (arXiv 2402.03300, equations 3 and 4); DAPO's upper clip (2503.14476); FocusDiff's
Pair-GRPO, whose group holds the samples of both prompts of a pair (wendell0218/FocusDiff, grpo_trainer_pair).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SCALES = ("group", "batch", "none")
LEAST_SPREAD = 1e-6  # below this, rewards are equal but for rounding
STEEPEST = 10.0  # nats: where the reference is so much likelier, the distance goes on as a straight line


def combined_rewards(rewards: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """Weighted sum of rewards, float32 (S,) each; NaN where a function does not apply, or none does.

    Functions that do not apply to a sample are left out of its sum, as in TRL.
    """
    values = torch.stack([weights[name] * each for name, each in rewards.items()])
    return torch.where(values.isnan().all(0), math.nan, values.nansum(0))


def group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, scale: str = "group", spread: float | None = None
) -> torch.Tensor:
    """How much better each sample is than its group: float32 (S,).

    (r - mean) / (std + 1e-4), std with Bessel's correction, both over the group's valid rewards. 0 where the reward is
    NaN, and for the whole of a group whose rewards are equal or of which fewer than two are valid.

    Args:
        rewards: float32 (S,).
        groups: long (S,), the group of each sample.
        scale: "group" divides by the group's own standard deviation, "batch" by `spread`, "none" by nothing.
        spread: standard deviation of all rewards of the optimizer step.
    """
    advantages = torch.zeros_like(rewards)
    for group in groups.unique():
        mine = (groups == group) & ~rewards.isnan()
        found = rewards[mine]
        if len(found) < 2 or found.std() < LEAST_SPREAD:
            continue
        below = {"group": found.std() + 1e-4, "batch": (spread or 0.0) + 1e-4, "none": 1.0}[scale]
        advantages[mine] = (found - found.mean()) / below
    return advantages


def distance(logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate of KL(policy, reference) of each choice (k3 of joschu.net/blog/kl-approx), the same shape.

    exp(d) - d - 1 with d = log reference - log policy. Where d is above `STEEPEST` the exponential goes on as its
    tangent: a ground truth that the policy has become unlikely to draw gave 1e7, and gradients to match.
    """
    d = reference - logps
    low = d.clamp(max=STEEPEST)
    return low.exp() * (1 + d - low) - d - 1


@dataclass
class Surrogate:
    """Per choice, float32 (S, N).

    Attributes:
        loss: with a gradient.
        clipped: 1 where the clip cut the gradient off.
    """

    loss: torch.Tensor
    clipped: torch.Tensor


def surrogate(logps: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> Surrogate:
    """PPO's clipped objective, to be minimised.

    Args:
        logps, old: float32 (S, N), log-probabilities now and when the samples were drawn.
        advantages: float32 (S,).
        low, high: how far the ratio may fall below and rise above 1.
    """
    ratio = (logps - old).exp()
    advantage = advantages[:, None]
    kept = ratio.clamp(1 - low, 1 + high)
    clipped = torch.where(advantage > 0, ratio > 1 + high, ratio < 1 - low) & (advantage != 0)
    return Surrogate(-torch.min(ratio * advantage, kept * advantage), clipped.float())
