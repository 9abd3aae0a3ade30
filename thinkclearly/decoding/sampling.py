"""Drawing one class from logits with noise that is keyed to (seed, sample, position).

The noise does not depend on how many positions or samples are decoded together, so a run is repeatable and a faster
decoder can be tested for identical tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def gumbel_noise(key: Sequence[int], positions: int, classes: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard Gumbel noise, float32 (positions, classes).

    Args:
        key: (seed, sample number), and what else tells draws apart. To numpy's `SeedSequence` a last 0 says nothing.
        device: where it is drawn. Every kind of device has noise of its own; the CPU's is the same for all.
    """
    number = int(np.random.SeedSequence(tuple(key)).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator(device).manual_seed(number)
    uniform = torch.rand(positions, classes, generator=generator, device=device)
    return -(-uniform.clamp(min=1e-20).log()).log()


def logistic(gumbel: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise as standard logistic noise: x + noise > 0 with probability sigmoid(x)."""
    spent = torch.exp(-gumbel)  # exponential
    return -spent - torch.log(-torch.expm1(-spent))


def warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """transformers' own temperature, top-k and nucleus filters; none at temperature 0, where sampling is greedy."""
    steps = LogitsProcessorList()
    if temperature > 0:
        if temperature != 1:
            steps.append(TemperatureLogitsWarper(float(temperature)))
        if top_k > 0:
            steps.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            steps.append(TopPLogitsWarper(top_p))
    return steps


def draw(logits: torch.Tensor, noise: torch.Tensor | None, filters: LogitsProcessorList) -> torch.Tensor:
    """Gumbel-max sample (or argmax without noise): (S, C) to long (S,)."""
    filtered = filters(None, logits)
    return (filtered if noise is None else filtered + noise).argmax(-1)
