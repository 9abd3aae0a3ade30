"""The language model over rows that stand at different positions, and rows that draw a picture.

Knows slots, keys and values. Does not know what the rows say, nor how a code is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thinkclearly.decoding.cache import BlockCache, masked_attention
from thinkclearly.models.protocol import TokenModel, position_ids


class Reader:
    """M rows and what is kept of them. A token stands in a slot and sees the slots before it.

    Args:
        visible: bool (M, C), False on left padding. All tensors are on its device, whatever device computes.
    """

    def __init__(self, family: TokenModel, visible: torch.Tensor):
        self.family = family
        self.positions = position_ids(visible.long())
        self.cache = BlockCache(family.language_model.config.num_hidden_layers, visible)

    def read(
        self, embeds: torch.Tensor, slots: torch.Tensor, end: int, rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Reads embeddings (A, T, H) into slots (A, T), all below `end`; returns hidden states (A, T, H).

        Args:
            rows: the rows that take part, where not all do.
        """
        language_model, positions = self.family.language_model, self.positions
        if rows is not None:
            positions = positions[torch.as_tensor(rows, device=positions.device)]
        with masked_attention(language_model):
            output = language_model(
                inputs_embeds=embeds,
                attention_mask=self.cache.step(slots, end, rows),
                position_ids=positions.gather(1, slots),
                past_key_values=self.cache,
                use_cache=True,
            )
        return output.last_hidden_state.to(embeds.device)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows, long (A,), in this order; one may come several times."""
        self.cache.keep(rows)
        self.positions = self.positions[rows]

    def reserve(self, capacity: int) -> None:
        """Makes room for this many slots."""
        if capacity > self.cache.visible.shape[1]:
            self.cache.grow(capacity)
            self.positions = position_ids(self.cache.visible.long())


class PictureRows:
    """Rows of a reader that draw: R next to each other for each sample, every one from the slot of its BOI on.

    Args:
        boi: (A, 1, H), the embedding that the first code is predicted from.
        last: the slot of each row's BOI.
        per_sample: R.
        rows: numbers of these rows where the reader has others as well; they stay as they are when samples are done.
    """

    def __init__(
        self,
        reader: Reader,
        boi: torch.Tensor,
        last: Sequence[int],
        per_sample: int,
        rows: Sequence[int] | None = None,
    ):
        self.reader, self.boi, self.per_sample, self.rows = reader, boi, per_sample, rows
        self.last = torch.tensor(last, device=boi.device).unsqueeze(1)
        self.latest = max(last)

    def forward(self, fed_codes: torch.Tensor, index: torch.Tensor, end: int) -> torch.Tensor:
        """Hidden states (A·R, B, H) that predict positions `index` (A, B), each from the code before it."""
        fed = self.reader.family.embed_codes(fed_codes).to(self.boi).repeat_interleave(self.per_sample, dim=0)
        index = index.repeat_interleave(self.per_sample, dim=0)
        fed = torch.where((index == 0).unsqueeze(-1), self.boi, fed)
        return self.reader.read(fed, index + self.last, self.latest + end, self.rows)

    def keep(self, samples: torch.Tensor) -> None:
        """Goes on with these samples, long (A,), in this order; one may come several times."""
        per_sample = self.per_sample
        if len(samples) * per_sample == len(self.boi) and bool((samples.diff() == 1).all()):
            return
        index = (samples.unsqueeze(1) * per_sample + torch.arange(per_sample, device=samples.device)).flatten()
        if self.rows is None:
            self.reader.keep(index)
        else:
            self.rows = [self.rows[i] for i in index.tolist()]
        self.boi, self.last = self.boi[index], self.last[index]
