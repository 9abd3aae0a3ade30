"""Drawing one class from logits with noise that is keyed to (seed, sample, position).

The noise does not depend on how many positions or samples are decoded together, so a run is repeatable and a faster
decoder can be tested for identical tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def gumbel_noise(seed: int, sample: int, positions: int, classes: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 (positions, classes); drawn on the CPU so that every device sees the same."""
    key = int(np.random.SeedSequence((seed, sample)).generate_state(1, np.uint64)[0] >> 1)
    uniform = torch.rand(positions, classes, generator=torch.Generator().manual_seed(key))
    return -(-uniform.clamp(min=1e-20).log()).log()


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
