"""Keys and values of rows that stand at different positions, and of the row that tells nothing.

Knows nothing of pictures or acceptance: it is told where the next tokens of each row belong.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.optim.optimizer import register_optimizer_step_post_hook
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

    A layer's keys and values lie where the layer computes; masks and slots come from the device of `visible`.

    Args:
        layers: number of layers of the language model.
        visible: bool (R, C), False on left padding. C slots in all: prompt, output and one block more.
    """

    def __init__(self, layers: int, visible: torch.Tensor):
        super().__init__(layers=[_BlockLayer(*visible.shape) for _ in range(layers)])
        self._see(visible)

    def step(self, slots: torch.Tensor, end: int, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Announces the slots (R, T) of the next tokens, all below `end`; returns their mask (R, 1, T, end).

        Args:
            rows: the rows that take part where not all do.
        """
        written = self.row_numbers if rows is None else torch.as_tensor(rows, device=self.visible.device)
        shown = slice(None) if rows is None else _as_slice(rows)  # a slice needs no copy
        for layer in self.layers:
            layer.announce(slots, end, written, written if shown is None else shown)
        keys = self.arange[:end]
        visible = self.visible[written]
        seen = (keys <= slots.unsqueeze(-1)) & visible[:, None, :end]
        # Padding sees itself: a query without any key would turn into NaN.
        return (seen | (keys == slots.unsqueeze(-1))).unsqueeze(1)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows, in this order: bool (R,) or long, where a row may come several times."""
        self._see(self.visible[rows])
        for layer in self.layers:
            layer.keep(rows)

    def grow(self, length: int) -> None:
        """Makes room for `length` slots a row."""
        self._see(F.pad(self.visible, (0, length - self.visible.shape[1]), value=True))
        for layer in self.layers:
            layer.grow(length)

    def _see(self, visible: torch.Tensor) -> None:
        self.visible = visible
        self.row_numbers, self.arange = (torch.arange(n, device=visible.device) for n in visible.shape)


def _as_slice(rows: Sequence[int]) -> slice | None:
    """The same rows as a slice; None where their distances differ."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    same = step > 0 and all(b - a == step for a, b in zip(rows, rows[1:]))
    return slice(rows[0], rows[-1] + 1, step) if same else None


class _BlockLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, rows: int, length: int):
        super().__init__()
        self.rows, self.length, self.end = rows, length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        heads, width = key_states.shape[1], key_states.shape[-1]
        # Zeros, not empty: what has not been written is masked, but zero times NaN would still be NaN.
        self.keys = key_states.new_zeros(self.rows, heads, self.length, width)
        self.values = value_states.new_zeros(self.rows, heads, self.length, value_states.shape[-1])
        self.is_initialized = True

    def announce(self, slots: torch.Tensor, end: int, written: torch.Tensor, shown: torch.Tensor | slice) -> None:
        self.slots, self.end, self.written, self.shown = slots, end, written, shown

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        device = key_states.device
        rows, slots = self.written.to(device)[:, None], self.slots.to(device)
        self.keys[rows, :, slots] = key_states.transpose(1, 2)
        self.values[rows, :, slots] = value_states.transpose(1, 2)
        shown = self.shown if isinstance(self.shown, slice) else self.shown.to(device)
        return self.keys[shown, :, : self.end], self.values[shown, :, : self.end]

    def keep(self, rows: torch.Tensor) -> None:
        here = rows.to(self.keys.device)
        self.keys, self.values = self.keys[here], self.values[here]
        self.rows = len(self.keys)

    def grow(self, length: int) -> None:
        if self.is_initialized:
            more = (0, 0, 0, length - self.length)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.length = length

    def get_seq_length(self) -> int:
        return int(self.end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end, 0

    def get_max_length(self) -> int:
        return self.length


@dataclass
class _Prefix:
    """Keys and values (heads, n, D) of each layer, of a row's first n positions, and what they were computed from."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    embeds: torch.Tensor
    state: tuple
    weights: list[ref]  # of the parameters: a new one may come to lie where an old one was


# The row that tells nothing is BOS, then padding: a shorter one is the beginning of a longer one, and it depends on
# nothing but the weights. The longest so far is kept with each language model.
_PREFIXES: WeakKeyDictionary[PreTrainedModel, _Prefix] = WeakKeyDictionary()
# A fused optimizer writes weights without raising their versions.
register_optimizer_step_post_hook(lambda *_: _PREFIXES.clear())


def kept_prefix(language_model: PreTrainedModel, embeds: torch.Tensor) -> _Prefix | None:
    """What is kept of a row that begins like `embeds` (n, H), if it is long enough and the weights are the same."""
    found = _PREFIXES.get(language_model)
    state = _weights_state(language_model)
    if found is None or state is None or len(found.embeds) < len(embeds) or found.state != state:
        return None
    if any(kept() is not weight for kept, weight in zip(found.weights, language_model.parameters())):
        return None
    same = found.embeds.device == embeds.device and found.embeds.dtype == embeds.dtype
    return found if same and torch.equal(found.embeds[: len(embeds)], embeds) else None


def keep_prefix(language_model: PreTrainedModel, cache: BlockCache, row: int, start: int, embeds: torch.Tensor):
    """Keeps what `cache` holds of a row from slot `start` on, the keys and values of `embeds` (n, H)."""
    if (state := _weights_state(language_model)) is None:
        return
    slots = slice(start, start + len(embeds))
    layers = [(layer.keys[row, :, slots].clone(), layer.values[row, :, slots].clone()) for layer in cache.layers]
    _PREFIXES[language_model] = _Prefix(layers, embeds.clone(), state, [ref(p) for p in language_model.parameters()])


def write_prefix(cache: BlockCache, prefix: _Prefix, row: int, start: int, length: int) -> None:
    """Puts the first `length` positions of a prefix into a row, from slot `start` on."""
    slots = slice(start, start + length)
    for layer, (keys, values) in zip(cache.layers, prefix.layers):
        layer.keys[row, :, slots], layer.values[row, :, slots] = keys[:, :length], values[:, :length]


def _weights_state(language_model: PreTrainedModel) -> tuple | None:
    """Changes whenever a weight is written or replaced, or an adapter is merged, switched or turned off.

    None where that cannot be told: weights that learn, come and go with the layers, or were made in inference mode.
    """
    if any(p.requires_grad or p.is_meta or p.is_inference() for p in language_model.parameters()):
        return None
    adapters = [
        (tuple(m.merged_adapters), tuple(m.active_adapters), m.disable_adapters)
        for m in language_model.modules()
        if isinstance(m, BaseTunerLayer)
    ]
    return tuple((p.data_ptr(), p._version) for p in language_model.parameters()), tuple(adapters)
