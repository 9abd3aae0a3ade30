"""The decoder loop: embedded guidance rows in, classes and codes out.

One loop for editing and text-to-image, with and without guidance or a CLEAR head. A pass checks a block of positions
at once: the source's tokens are the draft, and where they fail, what the pass before computed (Jacobi iteration). As
sampling noise is keyed to the position, the block's length changes the number of passes and never the tokens. Knows
nothing of pictures or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from thinkclearly.decoding.cache import BlockCache, masked_attention
from thinkclearly.decoding.guidance import guide, row_weights
from thinkclearly.decoding.sampling import draw, gumbel_noise, warpers
from thinkclearly.decoding.settings import PREFERENCES, DecodeSettings
from thinkclearly.instructions import gate_log_odds
from thinkclearly.models.backbone import positions, token_embeddings
from thinkclearly.models.clear_head import ClearEditModel

# Positions of an adaptive block: this many times what a sample got through on average, so that it grows while the
# draft holds, but neither more nor less than these.
GROWTH, MIN_BLOCK, MAX_BLOCK = 2.5, 8, 64
SHRINK = 0.75  # the cache is copied without the finished samples once no more than this share goes on


@dataclass
class Decoded:
    """What the loop leaves behind; S samples, N positions.

    Attributes:
        ids: long (S, N), classes in [0, K + I).
        tokens: long (S, N), what went back into the model: ids with instructions remapped to source codes.
        codes: long (S, N), the chosen code everywhere; where an instruction was chosen, the code that came next.
        gate: float32 (S, N), log-odds of copying at the operating point used, so calibrated ones minus what `prefer`
            asks plus `clear_bias`; NaN without a head. Factorised copies exactly where they are positive; joint
            (never calibrated) draws, or compares with the best code.
        passes: number of forward passes of the language model.
        accepted: positions that became final, for each pass a list of S numbers; 0 for samples that were finished.
        logits: float32 (S, N, K + I) where asked for: the scores that were chosen from.
    """

    ids: torch.Tensor
    tokens: torch.Tensor
    codes: torch.Tensor
    gate: torch.Tensor
    passes: int
    accepted: list[list[int]]
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
    per_prompt: int = 1,
    on_step: Callable[[int], None] | None = None,
    keep_logits: bool = False,
) -> Decoded:
    """Decodes S samples of P prompts with R guidance rows each.

    Args:
        embeds: (P·R, L, H), the rows of a prompt next to each other: full, part, uncond. All tensors are on its
            device, and so are the results; the parts of the model may lie on others.
        attention_mask: long (P·R, L), 0 on left padding.
        source_tokens: long (S, N), the draft; needed where the model may copy. Without it instructions are never
            chosen.
        samples: (seed, sample number) of each sample, which key its noise; those of a prompt next to each other.
        per_prompt: S / P, samples of each prompt. They have one source, and the prompt is read once for all of them.
        on_step: called with the number of positions done after each pass.
    """
    language_model = model.base.model.language_model
    count, rows = len(samples), embeds.shape[0] * per_prompt // len(samples)
    device, last = embeds.device, embeds.shape[1] - 1
    row, longest = math.isqrt(num_tokens), min(settings.block or MAX_BLOCK, num_tokens)
    room = num_tokens + longest  # a block may reach beyond the end
    choose = _Chooser(model, settings, rows, samples, source_tokens, room, device)
    cache = BlockCache(model.config.text_config.num_hidden_layers, attention_mask, last + 1 + room)
    places = positions(F.pad(attention_mask, (0, room), value=1))
    # Final up to `done`, a draft beyond: the source or what stands above, then what the last pass over it computed.
    tokens = torch.zeros(count, room, dtype=torch.long, device=device)
    if source_tokens is not None:
        tokens[:, :num_tokens] = source_tokens
    ids, codes = torch.zeros_like(tokens), torch.zeros_like(tokens)
    gate = torch.full(tokens.shape, float("nan"), device=device)
    kept = torch.zeros(count, room, model.vocabulary.num_classes, device=device) if keep_logits else None

    done, reached, accepted = [0] * count, [row] * count, []
    cached = list(range(count))  # samples that have rows in the cache
    length = shortest = min(settings.block or _shortest(row, source_tokens is not None, device), longest)
    while cached:
        live = torch.tensor(cached, device=device).unsqueeze(1)
        starts = [done[k] for k in cached]
        index = torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(length, device=device)
        if source_tokens is None:
            for k, end in ((k, done[k] + length) for k in cached if done[k] + length > reached[k]):
                tokens[k, reached[k] : end] = tokens[k, reached[k] - row : end - row].clone()
                reached[k] = end
        draft = tokens[live, index]
        if accepted:
            fed, columns = tokens[live, index - 1], index + last
        else:  # the prompt with the first block
            fed = draft[::per_prompt, :-1]
            columns = torch.arange(last + length, device=device).expand(count // per_prompt, -1)
        fed = token_embeddings(model.base, fed.repeat_interleave(rows, dim=0)).to(embeds)
        columns = columns.repeat_interleave(rows, dim=0)
        with masked_attention(language_model):
            hidden = (
                language_model(
                    inputs_embeds=fed if accepted else torch.cat([embeds, fed], dim=1),
                    attention_mask=cache.step(columns, end=last + max(starts) + length),
                    position_ids=places.gather(1, columns),
                    past_key_values=cache,
                    use_cache=True,
                )
                .last_hidden_state[:, -length:]
                .to(device)
            )
        if not accepted and per_prompt > 1:
            spread = torch.arange(embeds.shape[0], device=device).view(-1, rows)
            spread = spread.repeat_interleave(per_prompt, dim=0).flatten()
            cache.keep(spread)
            places, hidden = places[spread], hidden[spread]
        new_ids, new_tokens, *others = choose(hidden, live, index)
        # A position is final when everything before it was what has been fed; its own draft need not have been right.
        agreed = (new_tokens == draft)[:, :-1].long().cumprod(1).sum(1)
        if not settings.jacobi:
            new_tokens = torch.where(torch.arange(length, device=device) <= agreed.unsqueeze(1), new_tokens, draft)
        for buffer, value in zip((ids, tokens, codes, gate, kept), (new_ids, new_tokens, *others)):
            if buffer is not None:
                buffer[live, index] = value
        fresh = [0] * count
        for k, n in zip(cached, agreed.tolist()):
            fresh[k] = min(1 + n, num_tokens - done[k])
            done[k] += fresh[k]
        accepted.append(fresh)
        if on_step is not None:
            on_step(min(done))
        if not settings.block:
            length = _next_length(fresh, shortest, longest)
        going = [k for k in cached if done[k] < num_tokens]
        if len(going) <= SHRINK * len(cached):
            stay = torch.tensor([k in going for k in cached], device=device).repeat_interleave(rows)
            cache.keep(stay)
            places, cached = places[stay], going
    ids, tokens, codes, gate = (buffer[:, :num_tokens] for buffer in (ids, tokens, codes, gate))
    kept = None if kept is None else kept[:, :num_tokens]
    return Decoded(ids, tokens, codes, gate, len(accepted), accepted, kept)


def _shortest(row: int, with_source: bool, device: torch.device) -> int:
    """On a CPU every position costs; an accelerator reads the weights once a pass, whatever the block's length.

    With a source at least a row of the grid, so that what lies under an edited patch is guessed in the same pass.
    """
    if device.type != "cpu":
        return MAX_BLOCK
    return max(2 * MIN_BLOCK, row) if with_source else MIN_BLOCK


def _next_length(fresh: list[int], shortest: int, longest: int) -> int:
    """The luckiest sample's number would need fewer passes, but most of what they compute would be thrown away."""
    going = [n for n in fresh if n]
    return min(max(shortest, math.ceil(GROWTH * sum(going) / len(going))), longest)


class _Chooser:
    """From hidden states of all rows to one class, token and code at each position of a block."""

    def __init__(self, model: ClearEditModel, settings: DecodeSettings, rows, samples, source_tokens, room, device):
        self.model, self.settings, self.rows = model, settings, rows
        self.weights = row_weights(rows, settings.cfg_weight, settings.cfg_weight2)
        self.filters = warpers(settings.temperature, settings.top_k, settings.top_p)
        self.may_copy = source_tokens is not None and len(model.vocabulary) > 0
        if self.may_copy:
            self.transformed = F.pad(source_tokens, (0, room - source_tokens.shape[1])).unsqueeze(-2)
        self.noise = None
        if settings.temperature > 0:
            noise = [gumbel_noise(*key, room, model.vocabulary.num_classes) for key in samples]
            self.noise = torch.stack(noise).to(device)

    def __call__(self, hidden: torch.Tensor, live: torch.Tensor, index: torch.Tensor):
        """Hidden states (A·R, B, H) of samples (A, 1) at positions (A, B) to ids, tokens, codes, gate and scores."""
        settings, codebook = self.settings, self.model.vocabulary.codebook_size
        count, length = index.shape
        logits = self.model.logits(hidden).to(index.device).view(count, self.rows, length, -1)
        # Positions are drawn independently of each other: they count as samples here.
        guided = guide(logits, self.weights).flatten(0, 1)
        noise = None
        if self.noise is not None:
            noise = self.noise[live, index].flatten(0, 1)
        code = draw(guided[:, :codebook], None if noise is None else noise[:, :codebook], self.filters)
        choice, gate = code, torch.full_like(code, float("nan"), dtype=torch.float32)
        if self.may_copy and settings.guidance == "joint":
            guided = guided.clone()
            guided[:, codebook:] += settings.clear_bias
            gate = gate_log_odds(guided, codebook)
            choice = draw(guided, noise, self.filters)
            code = torch.where(choice < codebook, choice, code)  # top-k and top-p see one class more here
        elif self.may_copy:
            full = logits[:, 0].flatten(0, 1)
            config = self.model.clear_config
            gate = gate_log_odds(full, codebook, config.clear_weight) + config.gate_bias
            gate = gate / config.gate_temperature - PREFERENCES[settings.prefer] + settings.clear_bias
            choice = torch.where(gate > 0, codebook + full[:, codebook:].argmax(-1), code)
        ids, codes, gate = (value.view(count, length) for value in (choice, code, gate))
        tokens = ids
        if self.may_copy:
            tokens = self.model.vocabulary.remap(ids, self.transformed[live, :, index].transpose(1, 2))
        return ids, tokens, codes, gate, guided.view(count, length, -1)
