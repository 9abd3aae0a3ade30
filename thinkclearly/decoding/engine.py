"""The decoder loop: embedded guidance rows in, classes and codes out.

One loop for editing and text-to-image, with and without guidance or a CLEAR head. Knows nothing of pictures or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from thinkclearly.config import option
from thinkclearly.decoding.guidance import gate_log_odds, guide, row_weights
from thinkclearly.decoding.sampling import draw, gumbel_noise, warpers
from thinkclearly.models.backbone import positions, token_embeddings
from thinkclearly.models.clear_head import ClearEditModel


@dataclass
class DecodeSettings:
    """How to decode."""

    guidance: str = option(
        "factorised",
        "factorised: the full row alone decides on copying, guidance acts on codes; joint: the original's formula.",
    )
    cfg_weight: float = option(5.0, "Guidance weight w in u + w(c - u); see decoding/guidance.py.")
    cfg_weight2: float = option(5.0, "Weight of the part row (no source codes) against the full row.")
    clear_bias: float = option(0.0, "Added to the log-odds of copying (joint: to the CLEAR logit).")
    temperature: float = option(1.0, "Sampling temperature of the codes; 0 decodes greedily.")
    top_k: int = option(0, "Sample from the k best codes; 0 for all.")
    top_p: float = option(1.0, "Sample from the smallest set of codes with this probability mass.")
    use_cfg: bool = option(True, "Guidance; without it only the full row is decoded.")

    def __post_init__(self):
        if self.guidance not in ("factorised", "joint"):
            raise ValueError(f"guidance={self.guidance!r}; choose 'factorised' or 'joint'")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}; expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; expected a probability mass in (0, 1]")
        if self.cfg_weight2 < 0:
            raise ValueError(f"cfg_weight2={self.cfg_weight2}; expected 0 (full row alone) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}; expected 0 (all) or the number of codes to keep")


@dataclass
class Decoded:
    """What the loop leaves behind; S samples, N positions.

    Attributes:
        ids: long (S, N), classes in [0, K + I).
        tokens: long (S, N), what went back into the model: ids with instructions remapped to source codes.
        codes: long (S, N), the chosen code everywhere; where an instruction was chosen, the code that came next.
        gate: float32 (S, N), log-odds of copying at the operating point used; NaN without a head. Factorised copies
            exactly where they are positive; joint draws, or compares with the best code.
        passes: number of forward passes of the language model.
        logits: float32 (S, N, K + I) where asked for: the scores that were chosen from.
    """

    ids: torch.Tensor
    tokens: torch.Tensor
    codes: torch.Tensor
    gate: torch.Tensor
    passes: int
    logits: torch.Tensor | None = None


@torch.inference_mode()
def decode(
    model: ClearEditModel,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    num_tokens: int,
    settings: DecodeSettings,
    *,
    source_tokens: torch.Tensor | None = None,
    samples: list[tuple[int, int]],
    on_step: Callable[[int], None] | None = None,
    keep_logits: bool = False,
) -> Decoded:
    """Decodes S samples of R guidance rows each.

    Args:
        embeds: (S·R, L, H), the rows of a sample next to each other: full, part, uncond.
        attention_mask: long (S·R, L), 0 on left padding.
        source_tokens: long (S, N); needed where the model may copy. Without it instructions are never chosen.
        samples: (seed, sample number) of each sample, which key its noise.
        on_step: called with the number of positions done after each one.
    """
    count, rows = len(samples), embeds.shape[0] // len(samples)
    codebook, device = model.vocabulary.codebook_size, embeds.device
    config = model.clear_config
    weights = row_weights(rows, settings.cfg_weight, settings.cfg_weight2)
    filters = warpers(settings.temperature, settings.top_k, settings.top_p)
    may_copy = source_tokens is not None and len(model.vocabulary) > 0
    transformed = source_tokens.unsqueeze(-2) if may_copy else None
    noise = None
    if settings.temperature > 0:
        noise = torch.stack([gumbel_noise(*key, num_tokens, model.vocabulary.num_classes) for key in samples]).to(
            device
        )

    ids = torch.empty(count, num_tokens, dtype=torch.long, device=device)
    tokens, codes = torch.empty_like(ids), torch.empty_like(ids)
    gate = torch.full(ids.shape, float("nan"), device=device)
    kept = []

    language_model, cache = model.base.model.language_model, DynamicCache(config=model.config.text_config)
    full_mask = torch.cat([attention_mask, attention_mask.new_ones(embeds.shape[0], num_tokens)], dim=1)
    full_positions = positions(full_mask)
    start, length = 0, embeds.shape[1]
    for step in range(num_tokens):
        end = length + step
        hidden = language_model(
            inputs_embeds=embeds,
            attention_mask=full_mask[:, :end],
            position_ids=full_positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        start = end
        logits = model.logits(hidden).view(count, rows, -1)
        guided = guide(logits, weights)
        noise_now = None if noise is None else noise[:, step]
        code = draw(guided[:, :codebook], None if noise is None else noise_now[:, :codebook], filters)
        choice = code
        if may_copy and settings.guidance == "joint":
            guided = guided.clone()
            guided[:, codebook:] += settings.clear_bias
            gate[:, step] = gate_log_odds(guided, codebook)
            choice = draw(guided, noise_now, filters)
            code = torch.where(choice < codebook, choice, code)  # top-k and top-p see one class more here
        elif may_copy:
            odds = gate_log_odds(logits[:, 0], codebook, config.clear_weight)
            gate[:, step] = odds + settings.clear_bias
            copied = codebook + logits[:, 0, codebook:].argmax(-1)
            choice = torch.where(gate[:, step] > 0, copied, code)
        if keep_logits:
            kept.append(guided)
        ids[:, step], codes[:, step] = choice, code
        if may_copy:
            choice = model.vocabulary.remap(choice.unsqueeze(-1), transformed[..., step : step + 1]).squeeze(-1)
        tokens[:, step] = choice
        embeds = token_embeddings(model.base, choice.repeat_interleave(rows).unsqueeze(1)).to(embeds.dtype)
        if on_step is not None:
            on_step(step + 1)
    return Decoded(ids, tokens, codes, gate, num_tokens, torch.stack(kept, dim=1) if keep_logits else None)
