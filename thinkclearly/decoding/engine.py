"""The decoder loop for codes: embedded rows in, classes and codes out.

One loop for editing and text-to-image, for any family, any guidance and any vocabulary. A pass checks a block of
positions at once: the source's codes are the draft, and where they fail, what the pass before computed (Jacobi
iteration). As sampling noise is keyed to the position, the block's length changes the number of passes and never the
codes. Knows nothing of pictures or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from thinkclearly.decoding.cache import keep_prefix, kept_prefix, write_prefix
from thinkclearly.decoding.guidance import guidance_weights, guide
from thinkclearly.decoding.policy import choice_logps, operating_point
from thinkclearly.decoding.reader import PictureRows, Reader
from thinkclearly.decoding.sampling import draw, gumbel_noise, logistic, warpers
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.instructions import gate_log_odds
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.sequence import FULL, UNCOND

# Positions of an adaptive block: this many times what a sample got through on average, so that it grows while the
# draft holds, but neither more nor less than these.
GROWTH, MIN_BLOCK, MAX_BLOCK = 2.5, 8, 64
SHRINK = 0.75  # the cache is copied without the finished samples once no more than this share goes on


@dataclass
class Decoded:
    """What the loop leaves behind; S samples, N positions.

    Attributes:
        class_ids: long (S, N), in [0, K + I).
        fed_codes: long (S, N), what went back into the model: instructions remapped to their transform's codes.
        codes: long (S, N), the chosen code everywhere; where an instruction was chosen, the code that came next.
        gate: float32 (S, N), log-odds of copying at the operating point used, so calibrated ones minus what `prefer`
            asks plus `clear_bias`; NaN without a head. Factorised copies exactly where they are positive; joint
            (never calibrated) draws, or compares with the best code.
        passes: forward passes of the language model over the output, after the prompt was read.
        accepted: positions that became final, for each pass a list of S numbers; 0 for samples that were finished.
        logits: float32 (S, N, K + I) where asked for: the scores that were chosen from.
        logps: float32 (S, N) where asked for: log-probability of what was drawn, see `policy.choice_logps`.
    """

    class_ids: torch.Tensor
    fed_codes: torch.Tensor
    codes: torch.Tensor
    gate: torch.Tensor
    passes: int
    accepted: list[list[int]]
    logits: torch.Tensor | None = None
    logps: torch.Tensor | None = None


def guided_rows(settings: DecodeSettings, has_source: bool) -> dict[str, float]:
    """Name → weight of the rows to decode; rows without weight would be decoded only to be multiplied by 0."""
    if not settings.use_cfg:
        return {FULL: 1.0}
    return guidance_weights(settings.cfg_weight, settings.cfg_weight2 if has_source else 0.0)


@torch.inference_mode()
def decode(
    model: InstructionModel,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    num_tokens: int,
    settings: DecodeSettings,
    *,
    rows: dict[str, float],
    samples: Sequence[tuple[int, ...]],
    per_prompt: int = 1,
    source_tokens: torch.Tensor | None = None,
    transformed: torch.Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
    keep_logits: bool = False,
    keep_logps: bool = False,
) -> Decoded:
    """Decodes S samples of P prompts with R rows each.

    Args:
        embeds: (P·R, L, H), the rows of a prompt next to each other, in the order of `rows`. The last position is the
            one that the first code is predicted from. All tensors are on its device, and so are the results; the
            parts of the model may lie on others.
        attention_mask: long (P·R, L), 0 on left padding.
        rows: name → weight of each row in the guided logits; see `guided_rows`.
        samples: (seed, sample number) of each sample, or more numbers, which key its noise; those of a prompt next to
            each other.
        per_prompt: S / P, samples of each prompt. They have one source, and the prompt is read once for all of them.
        source_tokens: long (S, N), the draft; without it the draft is what stands above each position.
        transformed: long (S, I, N), codes of each instruction's transform of the source. Without it instructions are
            never chosen.
        on_step: called with the number of positions done after each pass.
    """
    # The prompts are read once for all samples; the last position is where the output begins.
    last, capacity = embeds.shape[1] - 1, num_tokens + longest_block(settings, num_tokens)
    reader = Reader(model.token_model, F.pad(attention_mask.bool(), (0, capacity), value=True))
    _read_prompts(reader, embeds[:, :last], attention_mask, list(rows))
    picture = PictureRows(reader, embeds[:, -1:], [last] * len(embeds), len(rows))
    picture.keep(torch.arange(len(samples), device=embeds.device) // per_prompt)
    return draw_codes(
        model,
        picture,
        num_tokens,
        settings,
        rows=rows,
        samples=samples,
        source_tokens=source_tokens,
        transformed=transformed,
        on_step=on_step,
        keep_logits=keep_logits,
        keep_logps=keep_logps,
    )


@torch.inference_mode()
def draw_codes(
    model: InstructionModel,
    picture: PictureRows,
    num_tokens: int,
    settings: DecodeSettings,
    *,
    rows: dict[str, float],
    samples: Sequence[tuple[int, ...]],
    source_tokens: torch.Tensor | None = None,
    transformed: torch.Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
    keep_logits: bool = False,
    keep_logps: bool = False,
) -> Decoded:
    """Decodes a picture for each of S samples whose rows have been read up to its BOI; arguments as for `decode`.

    Afterwards the reader holds keys and values of every code but the last.
    """
    count, width, device = len(samples), math.isqrt(num_tokens), picture.boi.device
    longest = longest_block(settings, num_tokens)
    capacity = num_tokens + longest  # a block may reach beyond the end
    choose = _Chooser(model, settings, rows, samples, transformed, capacity, device, keep_logps)
    board = _Board(count, num_tokens, capacity, width, device)
    board.logits = torch.zeros(count, capacity, choose.classes, device=device) if keep_logits else None
    board.logps = torch.zeros(count, capacity, device=device) if keep_logps else None
    if source_tokens is not None:
        board.fed_codes[:, :num_tokens], board.drafted = source_tokens, [capacity] * count
    length = shortest = min(settings.block or _shortest(width, source_tokens is not None, device), longest)
    while board.live:
        index = board.next_block(length)
        draft = board.draft(index)
        hidden = picture.forward(board.before(index), index, end=board.ends(length))
        found = choose(hidden, board.live_rows, index)
        fresh = board.commit(index, draft, found, settings.jacobi)
        if on_step is not None:
            on_step(min(board.done))
        if not settings.block:
            length = _next_length(fresh, shortest, longest)
        if (going := board.compact()) is not None:
            picture.keep(going)
    return board.finished()


def longest_block(settings: DecodeSettings, num_tokens: int) -> int:
    """Positions that a block may have, and so reach beyond the end."""
    return min(settings.block or MAX_BLOCK, num_tokens)


def _read_prompts(reader: Reader, embeds: torch.Tensor, mask: torch.Tensor, names: list[str]) -> None:
    """Reads prompts (P·R, L, H) whose rows have these names."""
    family, length, names = reader.family, embeds.shape[1], names * (len(embeds) // len(names))
    empty = [i for i, name in enumerate(names) if name == UNCOND]
    starts = (mask[:, :length] == 0).sum(1).tolist()
    prefix = None
    if empty:  # the row that tells nothing is the same in every call
        longest = min(empty, key=lambda i: starts[i])
        nothing = embeds[longest, starts[longest] :]
        prefix = kept_prefix(family.language_model, nothing)
    told = None if prefix is None else [i for i in range(len(names)) if i not in empty]
    slots = torch.arange(length, device=embeds.device).expand(len(embeds) if told is None else len(told), -1)
    reader.read(embeds if told is None else embeds[told], slots, length, told)
    if empty and prefix is None:
        keep_prefix(family.language_model, reader.cache, longest, starts[longest], nothing)
    for i in empty if prefix is not None else ():
        write_prefix(reader.cache, prefix, i, starts[i], length - starts[i])


class _Board:
    """S samples by `capacity` positions. Up to `done` what is there is final, beyond it is a draft.

    Attributes:
        live: samples that still have rows in the cache.
        drafted: how far each sample has a draft; beyond, the row of the grid above is copied.
    """

    def __init__(self, count: int, num_tokens: int, capacity: int, width: int, device: torch.device):
        self.num_tokens, self.width, self.device = num_tokens, width, device
        self.fed_codes = torch.zeros(count, capacity, dtype=torch.long, device=device)
        self.class_ids, self.codes = torch.zeros_like(self.fed_codes), torch.zeros_like(self.fed_codes)
        self.gate = torch.full(self.fed_codes.shape, float("nan"), device=device)
        self.logits: torch.Tensor | None = None
        self.logps: torch.Tensor | None = None
        self.done, self.drafted, self.live = [0] * count, [width] * count, list(range(count))
        self.accepted: list[list[int]] = []

    @property
    def live_rows(self) -> torch.Tensor:
        """Long (A, 1), the live samples."""
        return torch.tensor(self.live, device=self.device).unsqueeze(1)

    def next_block(self, length: int) -> torch.Tensor:
        """Long (A, B), the next positions of each live sample; they have a draft afterwards."""
        for k in self.live:
            start, end = self.drafted[k], self.done[k] + length
            if end > start:
                above = slice(start - self.width, end - self.width)
                self.fed_codes[k, start:end], self.drafted[k] = self.fed_codes[k, above].clone(), end
        starts = torch.tensor([self.done[k] for k in self.live], device=self.device)
        return starts.unsqueeze(1) + torch.arange(length, device=self.device)

    def ends(self, length: int) -> int:
        """The position after the last one of a block."""
        return max(self.done[k] for k in self.live) + length

    def draft(self, index: torch.Tensor) -> torch.Tensor:
        return self.fed_codes[self.live_rows, index]

    def before(self, index: torch.Tensor) -> torch.Tensor:
        """Codes (A, B) that come before each position; of no meaning at position 0."""
        return self.fed_codes[self.live_rows, (index - 1).clamp(min=0)]

    def commit(self, index: torch.Tensor, draft: torch.Tensor, found: _Found, jacobi: bool) -> list[int]:
        """Takes what a pass found over; accepts positions. Returns how many are new for each of the S samples."""
        # Accept a position once every earlier draft code matched; its own draft may have been wrong.
        matched = (found.fed_codes == draft)[:, :-1].long().cumprod(1).sum(1)
        fed_codes = found.fed_codes
        if not jacobi:
            behind = torch.arange(index.shape[1], device=self.device) > matched.unsqueeze(1)
            fed_codes = torch.where(behind, draft, fed_codes)
        live = self.live_rows
        self.class_ids[live, index], self.fed_codes[live, index] = found.class_ids, fed_codes
        self.codes[live, index], self.gate[live, index] = found.codes, found.gate
        if self.logits is not None:
            self.logits[live, index] = found.logits
        if self.logps is not None:
            self.logps[live, index] = found.logps
        fresh = [0] * len(self.done)
        for k, n in zip(self.live, matched.tolist()):
            fresh[k] = min(1 + n, self.num_tokens - self.done[k])
            self.done[k] += fresh[k]
        self.accepted.append(fresh)
        return fresh

    def compact(self) -> torch.Tensor | None:
        """Which of the live samples go on, long (A',), once enough are finished to be worth a copy of the cache."""
        going = [i for i, k in enumerate(self.live) if self.done[k] < self.num_tokens]
        if len(going) > SHRINK * len(self.live):
            return None
        self.live = [self.live[i] for i in going]
        return torch.tensor(going, dtype=torch.long, device=self.device) if going else None

    def finished(self) -> Decoded:
        whole = (self.class_ids, self.fed_codes, self.codes, self.gate)
        logits, logps = (None if t is None else t[:, : self.num_tokens] for t in (self.logits, self.logps))
        whole = (part[:, : self.num_tokens] for part in whole)
        return Decoded(*whole, len(self.accepted), self.accepted, logits, logps)


def _shortest(width: int, with_source: bool, device: torch.device) -> int:
    """On a CPU every position costs; an accelerator reads the weights once a pass, whatever the block's length.

    With a source at least a row of the grid, so that what lies under an edited patch is guessed in the same pass.
    """
    if device.type != "cpu":
        return MAX_BLOCK
    return max(2 * MIN_BLOCK, width) if with_source else MIN_BLOCK


def _next_length(fresh: list[int], shortest: int, longest: int) -> int:
    """Sized by the mean acceptance: sizing by the best sample saves passes but wastes computation."""
    going = [n for n in fresh if n]
    return min(max(shortest, math.ceil(GROWTH * sum(going) / len(going))), longest)


@dataclass
class _Found:
    """What a pass computed at each position of a block, (A, B) each; logits (A, B, K + I). `logps` where asked for."""

    class_ids: torch.Tensor
    fed_codes: torch.Tensor
    codes: torch.Tensor
    gate: torch.Tensor
    logits: torch.Tensor
    logps: torch.Tensor | None


class _Chooser:
    """From hidden states of all rows to one class and code at each position of a block."""

    def __init__(self, model, settings: DecodeSettings, rows, samples, transformed, capacity, device, keep_logps):
        self.keep_logps = keep_logps
        self.model, self.settings, self.weights = model, settings, rows
        self.classes = model.vocabulary.num_classes
        self.filters = warpers(settings.temperature, settings.top_k, settings.top_p)
        self.may_copy = transformed is not None and len(model.vocabulary) > 0
        if self.may_copy:
            self.transformed = F.pad(transformed, (0, capacity - transformed.shape[-1]))
        self.noise = None
        if settings.temperature > 0:
            where = device if settings.device_noise else "cpu"
            noise = [gumbel_noise(key, capacity, self.classes, where) for key in samples]
            self.noise = torch.stack(noise).to(device)

    def __call__(self, hidden: torch.Tensor, live: torch.Tensor, index: torch.Tensor) -> _Found:
        """Hidden states (A·R, B, H) of samples (A, 1) at positions (A, B)."""
        settings, codebook = self.settings, self.model.vocabulary.codebook_size
        count, length = index.shape
        logits = self.model.logits(hidden).to(index.device).view(count, len(self.weights), length, -1)
        # 1. Guide: (A, R, B, C) to (A·B, C). Positions are drawn independently: they count as samples here.
        rows = dict(zip(self.weights, logits.unbind(1)))
        guided = guide(rows, self.weights).flatten(0, 1)
        # 2. The code that is drawn where nothing is copied.
        noise = None if self.noise is None else self.noise[live, index].flatten(0, 1)
        code = draw(guided[:, :codebook], None if noise is None else noise[:, :codebook], self.filters)
        choice, gate = code, torch.full_like(code, float("nan"), dtype=torch.float32)
        # 3. Copy or paint.
        if self.may_copy and settings.guidance == "joint":
            guided = guided.clone()
            guided[:, codebook:] += settings.clear_bias
            gate = gate_log_odds(guided, codebook)
            choice = draw(guided, noise, self.filters)
            # Top-k and top-p see the instructions here, too.
            code = torch.where(self.model.vocabulary.is_instruction(choice), code, choice)
        elif self.may_copy:
            full = rows[FULL].flatten(0, 1)
            gate = operating_point(self.model.gate(full), settings)
            threshold = -logistic(noise[:, codebook]) if settings.sample_gate else 0.0
            choice = torch.where(gate > threshold, codebook + full[:, codebook:].argmax(-1), code)
        logps = None
        if self.keep_logps:
            copied = self.model.vocabulary.is_instruction(choice)
            codes = self.filters(None, guided[:, :codebook])
            logps = choice_logps(codes, code, copied, gate if settings.sample_gate and self.may_copy else None)
            logps = logps.view(count, length)
        # 4. What goes back into the model.
        class_ids, codes, gate = (value.view(count, length) for value in (choice, code, gate))
        fed_codes = class_ids
        if self.may_copy:
            fed_codes = self.model.vocabulary.remap(class_ids, self.transformed[live, :, index].transpose(1, 2))
        return _Found(class_ids, fed_codes, codes, gate, guided.view(count, length, -1), logps)
