"""Token ids of single rows to one left-padded batch. Knows no family: a processor lays its rows out itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thinkclearly.models.protocol import PromptBatch


@dataclass
class RowLayout:
    """One row without padding.

    Attributes:
        ids: token ids.
        seen, known: for each picture of the row where its features and its codes go; -1 for nowhere.
        pictures: numbers of these pictures.
        drawn: where the first drawn code is fed back; -1 where nothing is drawn.
    """

    ids: list[int]
    seen: list[int]
    known: list[int]
    pictures: list[int]
    drawn: int


def batch_rows(rows: Sequence[RowLayout], pad_id: int, fed_back: int = 0) -> PromptBatch:
    """Rows of one length.

    Args:
        fed_back: positions to add to rows that draw, for what is fed back in training; 0 for the prompt alone.
    """
    ids = [row.ids + [pad_id] * (fed_back if row.drawn >= 0 else 0) for row in rows]
    pads = [max(map(len, ids)) - len(row) for row in ids]
    width = max(len(row.pictures) for row in rows)

    def columns(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor([row + [-1] * (width - len(row)) for row in values]).view(len(ids), width)

    def slots(values: list[list[int]]) -> torch.Tensor:
        return columns([[slot + pad if slot >= 0 else -1 for slot in row] for row, pad in zip(values, pads)])

    return PromptBatch(
        torch.tensor([[pad_id] * pad + row for pad, row in zip(pads, ids)]),
        torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, ids)]),
        slots([row.seen for row in rows]),
        slots([row.known for row in rows]),
        columns([row.pictures for row in rows]),
        torch.tensor([row.drawn + pad if fed_back and row.drawn >= 0 else -1 for row, pad in zip(rows, pads)]),
    )
