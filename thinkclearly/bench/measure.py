"""Interleaved timing, and ratios with their spread. Knows nothing of what is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn


@dataclass
class Run:
    """One row of one round.

    Attributes:
        seconds: from picture and words to the finished picture.
        decode: of them, embedding the prompt and decoding the tokens.
        passes: forward passes of the language model, mean over the pictures; its tokens where each is one pass.
    """

    seconds: float
    decode: float
    passes: float


def now(device: torch.device) -> float:
    """Seconds on a clock that has waited for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    rows: Mapping[str, Callable[[], Run]], rounds: int, tick: Callable[[], None], warm_up: bool = True
) -> dict[str, list[Run]]:
    """Every row once a round, each round starting with the next row.

    What else the machine does then falls on all rows alike, and a ratio within a round compares neighbours in time.

    Args:
        tick: called after every run.
        warm_up: begin with a round that does not count.
    """
    names, runs = list(rows), {name: [] for name in rows}
    for number in range(-int(warm_up), rounds):
        for name in names[max(number, 0) % len(names) :] + names[: max(number, 0) % len(names)]:
            run = rows[name]()
            if number >= 0:
                runs[name].append(run)
            tick()
    return runs


def summary(runs: Mapping[str, list[Run]], of: str) -> dict[str, dict]:
    """Per row the median seconds, the passes, and the speed against row `of`: median, least, most over the rounds."""
    table = {}
    for name, row in runs.items():
        table[name] = {"rounds": [vars(run) for run in row], "passes": median(run.passes for run in row)}
        for clock in ("seconds", "decode"):
            ratios = [getattr(base, clock) / getattr(run, clock) for base, run in zip(runs[of], row)]
            table[name][clock] = median(getattr(run, clock) for run in row)
            table[name][f"{clock}_ratio"] = [median(ratios), min(ratios), max(ratios)]
    return table


def copy_bandwidth(device: torch.device, size: int = 2**28, times: int = 8) -> float:
    """Bytes read and written per second by a copy of `size` bytes, the best of some."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(times):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * size / min(seconds)


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the weights that every pass reads; of an embedding it reads single rows, not counted."""
    parts = [part for module in modules for part in module.modules() if not isinstance(part, nn.Embedding)]
    return sum(p.numel() * p.element_size() for part in parts for p in part.parameters(recurse=False))
