"""What must come out the same on every machine: float32 without shortcuts, and hashes of weights."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from contextlib import contextmanager

import torch

_PRECISION = threading.RLock()  # what it guards belongs to the process


@contextmanager
def full_precision(device: torch.device):
    """An image tokenizer runs in float32 whatever the rest does: an argmin over codes depends on the dtype.

    TF32, which CUDA takes for float32 unless told otherwise, is off meanwhile.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with _PRECISION:
            kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
            before = [kind.fp32_precision for kind in kinds]
            try:
                for kind in kinds:
                    kind.fp32_precision = "ieee"
                yield
            finally:
                for kind, precision in zip(kinds, before):
                    kind.fp32_precision = precision


def hash_of(tensors: Iterable[torch.Tensor]) -> str:
    """16 hex digits of the SHA-256 of CPU tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
