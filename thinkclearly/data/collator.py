"""Prepared rows to a training batch: prompt, slots, labels, and which conditions each row is shown.

Condition dropout trains the rows that guidance needs at inference. It is keyed to (seed, epoch, record), so it does
not depend on batch size, accumulation, workers or processes. Knows nothing of weights.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

from thinkclearly.data.features import FeatureCache, source_square
from thinkclearly.data.sources import BadRecord
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.prompt import FULL, PART, UNCOND, ClearEditProcessor


class EditCollator:
    """Builds batches for `ClearEditModel.forward`.

    Labels of dropped rows: PART rows (no source codes) keep their instruction labels, since the picture features and
    the words still tell what stays; UNCOND rows are told nothing, CLEAR would mean nothing there, so they are labelled
    with plain codes.

    Args:
        processor: the one that inference uses.
        vocabulary: class ids of the labels.
        drop_all (`float`): share of rows that see neither picture nor words (UNCOND).
        drop_source (`float`): share of the remaining rows that do not see the source codes (PART).
        seed (`int`): keys the dropout.
        features: read instead of the pictures, where given.
    """

    def __init__(
        self,
        processor: ClearEditProcessor,
        vocabulary: InstructionVocabulary,
        drop_all: float = 0.0,
        drop_source: float = 0.0,
        seed: int = 0,
        features: FeatureCache | None = None,
    ):
        self.processor, self.vocabulary, self.features = processor, vocabulary, features
        self.drop_all, self.drop_source, self.seed = drop_all, drop_source, seed
        # Shared memory: data loader workers must see the epoch that the training loop is in.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def condition(self, key: str) -> int:
        """FULL, PART or UNCOND for a record in the current epoch."""
        rng = np.random.default_rng((self.seed, int(self.epoch), zlib.crc32(key.encode())))
        if rng.random() < self.drop_all:
            return UNCOND
        return PART if rng.random() < self.drop_source else FULL

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        conditions = [self.condition(row["key"]) for row in rows]
        prompt = self.processor.edit_rows([row["instruction"] for row in rows], conditions)
        source_tokens = torch.tensor([row["input_tokens"] for row in rows])
        labels = torch.tensor([row["output_tokens"] for row in rows])
        dropped = torch.tensor([condition == UNCOND for condition in conditions])
        plain = self.vocabulary.remap(labels, source_tokens.unsqueeze(-2))
        batch = dict(vars(prompt))
        batch["source_tokens"] = source_tokens
        batch["labels"] = torch.where(dropped[:, None], plain, labels)
        missing = [row["key"] for row in rows if row.get("source") is None]
        if missing and len(missing) < len(rows):
            raise BadRecord(
                f"{', '.join(missing)}: no source picture, while other records have one. Leave these records out, or "
                "remove the column 'source' to train on pictures decoded from the codes."
            )
        if not missing:
            if self.features is not None:
                batch["features"] = self.features.read(rows)
            else:
                squares = [source_square(row, self.processor.image_size) for row in rows]
                batch["pixel_values"] = self.processor.pixel_values(squares)
        return batch
