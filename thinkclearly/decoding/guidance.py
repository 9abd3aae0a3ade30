"""From the guidance rows' logits to one distribution over codes.

Edit rows are full, part and uncond; text-to-image rows full and uncond (models/prompt.py). Knows nothing of models.
"""

from __future__ import annotations

import torch


def row_weights(rows: int, cfg_weight: float, cfg_weight2: float) -> list[float]:
    """Share of each row in the guided logits; they sum to 1.

    Janus-4o's formula, c = (full + w2·part) / (1 + w2) and u + w(c − u), written as one linear combination.
    """
    if rows == 1:
        return [1.0]
    if rows == 2:
        return [cfg_weight, 1 - cfg_weight]
    return [cfg_weight / (1 + cfg_weight2), cfg_weight * cfg_weight2 / (1 + cfg_weight2), 1 - cfg_weight]


def guide(row_logits: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """Linear combination over the rows: (S, R, C) to (S, C)."""
    return sum(weight * row_logits[:, i] for i, weight in enumerate(weights))
