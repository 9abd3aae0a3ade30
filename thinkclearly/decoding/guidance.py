"""From the logits of named rows to one distribution: a weighted sum whose weights sum to 1.

Janus-4o's formulas are tables of weights by row name; other systems bring other tables. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thinkclearly.sequence import FULL, NO_SOURCE, UNCOND


def guidance_weights(cfg_weight: float, cfg_weight2: float = 0.0) -> dict[str, float]:
    """Share of each row in the guided logits, of the rows that have one.

    Janus-4o's formula, c = (full + w2·no_source) / (1 + w2) and u + w(c − u), written as one linear combination. With
    `cfg_weight2` 0, as for text-to-image, it is the ordinary u + w(full − u). The full row is always there: it alone
    decides on copying.
    """
    share = cfg_weight / (1 + cfg_weight2)
    others = {NO_SOURCE: share * cfg_weight2, UNCOND: 1 - cfg_weight}
    return {FULL: share} | {name: weight for name, weight in others.items() if weight}


def guide(rows: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """Weighted sum of the rows' logits, float (..., C) each."""
    return sum(weight * rows[name] for name, weight in weights.items())
