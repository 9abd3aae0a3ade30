"""A key-value cache whose rows stand at different positions and can be written over.

Knows nothing of pictures or acceptance: it is told where the next tokens of each row belong.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

_LOCK = threading.Lock()
_SWITCHED: dict[int, tuple[str, int]] = {}  # id of a config → its own implementation, how many are inside


@contextmanager
def masked_attention(language_model: PreTrainedModel):
    """With sdpa, which takes any mask: flash attention knows causal ones only, eager would add ours as numbers.

    The setting belongs to the model, which several threads may use: the first one in switches, the last one out
    switches back. Whatever else runs the model meanwhile has to be inside as well.
    """
    config = language_model.config
    with _LOCK:
        own, inside = _SWITCHED.get(id(config), (config._attn_implementation, 0))
        _SWITCHED[id(config)] = own, inside + 1
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        with _LOCK:
            own, inside = _SWITCHED.pop(id(config))
            if inside > 1:
                _SWITCHED[id(config)] = own, inside - 1
            else:
                config._attn_implementation = own


class BlockCache(Cache):
    """Static keys and values; each row writes where it stands, so that taking tokens back costs nothing.

    A layer's keys and values lie where the layer computes; masks and columns come from the device of `attention_mask`.

    Args:
        layers: number of layers of the language model.
        attention_mask: long (R, L), 0 on the prompt's left padding.
        length: columns in all: prompt, output and one block more.
    """

    def __init__(self, layers: int, attention_mask: torch.Tensor, length: int):
        super().__init__(layers=[_BlockLayer(length) for _ in range(layers)])
        device = attention_mask.device
        self.visible = torch.ones(attention_mask.shape[0], length, dtype=torch.bool, device=device)
        self.visible[:, : attention_mask.shape[1]] = attention_mask.bool()
        self.arange = torch.arange(length, device=device)

    def step(self, columns: torch.Tensor, end: int) -> torch.Tensor:
        """Announces the columns (R, T) of the next tokens, all below `end`; returns their mask (R, 1, T, end)."""
        for layer in self.layers:
            layer.columns, layer.end = columns, end
        keys = self.arange[:end]
        seen = (keys <= columns.unsqueeze(-1)) & self.visible[:, None, :end]
        # Padding sees itself: a query without any key would turn into NaN.
        return (seen | (keys == columns.unsqueeze(-1))).unsqueeze(1)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows, in this order: bool (R,) or long, where a row may come several times."""
        self.visible = self.visible[rows]
        for layer in self.layers:
            here = rows.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[here], layer.values[here]
            layer.rows = torch.arange(layer.keys.shape[0], device=layer.keys.device).unsqueeze(1)


class _BlockLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, length: int):
        super().__init__()
        self.length, self.columns, self.end = length, None, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.rows = torch.arange(rows, device=key_states.device).unsqueeze(1)
        # Zeros, not empty: what has not been written is masked, but zero times NaN would still be NaN.
        self.keys = key_states.new_zeros(rows, heads, self.length, width)
        self.values = value_states.new_zeros(rows, heads, self.length, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        columns = self.columns.to(key_states.device)
        self.keys[self.rows, :, columns] = key_states.transpose(1, 2)
        self.values[self.rows, :, columns] = value_states.transpose(1, 2)
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def get_seq_length(self) -> int:
        return 0 if self.columns is None else int(self.end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0

    def get_max_length(self) -> int:
        return self.length
