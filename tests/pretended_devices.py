"""Devices on a machine that has none, to show where a model's tensors go.

The tensors of "cpu:1" and "cpu:2" hold ordinary CPU data, so that what is
computed is real, but an operation that meets tensors of two devices fails as it would on two GPUs. This does not show
speed, nor that two kinds of hardware give the same bits.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
aten = torch.ops.aten
MOVES = (aten.to, aten._to_copy, aten.copy_)


class Pretended(torch.Tensor):
    """A tensor of a pretended device; `data_here` is its data."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data, device=None, requires_grad=False):
        layout = {"strides": data.stride(), "storage_offset": data.storage_offset(), "dtype": data.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, device=device or data.device, **layout)

    def __init__(self, data, device=None, requires_grad=False):
        self.data_here = data.data_here if isinstance(data, Pretended) else data

    def __repr__(self):
        return f"Pretended({self.data_here}, {self.device})"

    def tolist(self):
        return self.data_here.tolist()

    def __torch_dispatch__(operation, types, args=(), kwargs=None):  # noqa: N805
        return _compute(operation, args, kwargs or {})


@contextmanager
def pretended_devices():
    """Inside, tensors can be moved to and made on "cpu:1" and "cpu:2"."""
    with _Factories(), _Operations():
        yield


class _Factories(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.tensor and kwargs and "device" in kwargs:  # goes to its device unseen by the other mode
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _compute(operation, args, kwargs or {})


def _compute(operation, args, kwargs):
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    moves = operation.overloadpacket in MOVES
    # A single number may come from anywhere.
    found = {tensor.device for tensor in tensors if tensor.ndim} or {tensor.device for tensor in tensors}
    if len(found) > 1 and not moves:
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, found {found}")
    if operation is aten.to.other:
        device = args[1].device
    else:
        device = asked[0] if asked else tensors[0].device if moves else next(iter(found), CPU)
    args_here, kwargs_here = (
        tree_map_only(torch.device, lambda _: CPU, tree_map_only(Pretended, lambda x: x.data_here, part))
        for part in (args, kwargs)
    )
    result = operation(*args_here, **kwargs_here)
    if operation._schema.is_mutable:
        return args[0]
    with torch.inference_mode(False):  # else a view of a parameter could not be made
        return result if device == CPU else tree_map_only(torch.Tensor, lambda x: Pretended(x, device), result)
