"""What training asks of K + I logits at every output position, without all of them in memory at once.

Knows the cross-entropy and how it is cut into chunks. Does not know where hidden states come from or how losses are
weighted. Libraries with a fused linear cross-entropy (Liger, Apple's cut cross-entropy) need Triton and one plain
linear layer; Janus's head is two with an activation between, perhaps with LoRA inside, and CLEAR's is a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from thinkclearly.instructions import gate_log_odds

CHUNK = 1024  # positions at most: float32 logits of 16,385 classes are 64 MiB, three times that with their gradient


@dataclass
class Scores(ModelOutput):
    """Teacher-forced scores of every position; only `nll` has a gradient.

    Attributes:
        nll: float32 (B, N), negative log-likelihood of the label, in nats.
        predicted: long (B, N), the likeliest of all K + I classes.
        code: long (B, N), the likeliest of the K codes.
        gate: float32 (B, N), log-odds of copying as the logits give them (`gate_log_odds`).
        word_nll: float32 (A,), negative log-likelihood of the words of answers, with a gradient; None without answers.
        word: long (A,), the likeliest word.
    """

    nll: torch.Tensor | None = None
    predicted: torch.Tensor | None = None
    code: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    word_nll: torch.Tensor | None = None
    word: torch.Tensor | None = None


def weighted_loss(nll: torch.Tensor, weights: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """Weighted cross-entropy divided by the sum of the weights, as torch's own weighted mean is.

    Args:
        nll: float32, negative log-likelihood of the labels.
        weights: float32, the same shape.
        total: sum of weights to divide by; that of these labels where not given. With gradient accumulation or
            several processes it is the sum over the whole optimizer step.
    """
    return (nll * weights).sum() / (weights.sum() if total is None else total)


def score_logits(logits: torch.Tensor, labels: torch.Tensor, codebook_size: int) -> Scores:
    """Scores of logits that are there: float32 (..., K + I) and long labels (...) to scores (...)."""
    nll = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
    # After the loss: a chunk that is computed again stops at the last tensor that the backward pass needs.
    with torch.no_grad():
        codes = logits[..., :codebook_size]
        return Scores(nll, logits.argmax(-1), codes.argmax(-1), gate_log_odds(logits, codebook_size))


def score_hidden(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor, codebook_size: int
) -> Scores:
    """Scores of hidden states, by chunks of at most `CHUNK` positions.

    The backward pass computes a chunk's logits again, except the last one's: it begins there, when it would have to
    hold them anyway. So nothing is computed twice where one chunk is enough.

    Args:
        head: hidden states (..., H) to float32 logits (..., K + I).
        hidden: (B, N, H).
        labels: long (B, N).
    """

    def score(states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return score_logits(head(states), targets, codebook_size).to_tuple()

    parts = by_chunks(score, hidden.flatten(0, -2), labels.flatten())
    return Scores(*(part.view_as(labels) for part in parts))


def score_words(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood and likeliest word: hidden states (A, H) and long labels (A,) to (A,) each."""

    def score(states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = head(states)
        return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1)

    return by_chunks(score, hidden, labels)


def by_chunks(score: Callable, states: torch.Tensor, targets: torch.Tensor, rows: int = 1) -> tuple[torch.Tensor, ...]:
    """What `score` makes of states (M, ..., H) and targets (M,), computed by chunks and joined: tensors (M,).

    Args:
        rows: states of each target, which make its chunk so much larger.
    """
    length = max(1, chunk_length(rows * len(targets)) // rows)
    pieces = list(zip(states.split(length), targets.split(length)))
    scored = [checkpoint(score, *piece, use_reentrant=False) for piece in pieces[:-1]] + [score(*pieces[-1])]
    return tuple(torch.cat(parts) for parts in zip(*scored))


def chunk_length(positions: int) -> int:
    """Positions of a chunk: as even as possible, at most `CHUNK`."""
    return max(1, math.ceil(positions / max(1, math.ceil(positions / CHUNK))))
