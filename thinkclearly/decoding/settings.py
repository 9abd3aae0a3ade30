"""How to decode: the options of the engine. Light, so that a command line can list them without a model's imports."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from thinkclearly.recipe import option

# Log-odds of copying at which a mistake costs the same either way: a false CLEAR leaves a hole in the edit, a missed
# one costs exactness.
PREFERENCES = {"edit": math.log(10), "balanced": 0.0, "exact": -math.log(10)}


@dataclass
class DecodeSettings:
    """How to decode."""

    guidance: str = option(
        "factorised",
        "factorised: the full row alone decides on copying, guidance acts on codes; joint: the original's formula.",
    )
    cfg_weight: float = option(5.0, "Guidance weight w in u + w(c - u); see decoding/guidance.py.")
    cfg_weight2: float = option(5.0, "Weight of the no_source row (no source codes) against the full row.")
    prefer: str = option(
        "balanced",
        "edit: copy only where unchanged is 10 times as likely (no holes in edits); exact: the other way round.",
    )
    clear_bias: float = option(0.0, "Added to the calibrated log-odds of copying (joint: to the CLEAR logit).")
    temperature: float = option(1.0, "Sampling temperature of the codes; 0 decodes greedily.")
    top_k: int = option(0, "Sample from the k best codes; 0 for all.")
    top_p: float = option(1.0, "Sample from the smallest set of codes with this probability mass.")
    use_cfg: bool = option(True, "Guidance; without it only the full row is decoded.")
    block: int = option(0, "Positions that one pass checks; 0 adapts, 1 decodes one by one. The tokens are the same.")
    sample_gate: bool = option(
        False,
        "Draw copy or paint with the gate's probability, instead of the likelier one (factorised alone).",
    )
    device_noise: bool = option(
        False, "Draw the noise on the model's device: faster there, but not the same on every kind of device."
    )
    jacobi: bool = option(
        True,
        "Guess codes from the pass before; without it the source alone is the draft. The tokens are the same.",
    )

    def __post_init__(self):
        if self.guidance not in ("factorised", "joint"):
            raise ValueError(f"guidance={self.guidance!r}; choose 'factorised' or 'joint'")
        if self.prefer not in PREFERENCES:
            raise ValueError(f"prefer={self.prefer!r}; choose from {', '.join(PREFERENCES)}")
        for name in ("cfg_weight", "cfg_weight2", "clear_bias"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}; expected a finite number")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}; expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; expected a probability mass in (0, 1]")
        if self.cfg_weight2 < 0:
            raise ValueError(f"cfg_weight2={self.cfg_weight2}; expected 0 (full row alone) or more")
        if self.sample_gate and (self.guidance == "joint" or self.temperature == 0):
            raise ValueError("sample_gate draws from the gate: it needs guidance=factorised and a temperature above 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}; expected 0 (all) or the number of codes to keep")
        if self.block < 0:
            raise ValueError(f"block={self.block}; expected 0 (adaptive), 1 (one by one) or a number of positions")


def check_seed(seed) -> None:
    """Raises `ValueError` for a seed that cannot key noise, before anything is computed with it."""
    if type(seed) is bool or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r}; expected a whole number from 0 to 2**64 - 1, which gives the same each time")
