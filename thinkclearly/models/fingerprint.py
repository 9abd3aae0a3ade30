"""What a model's answers depend on, in a form that a folder of results can hold and compare.

Knows nothing of pictures or of how answers are decoded.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch

from thinkclearly.models.instruction_head import InstructionModel

SAMPLES = 4096  # values that are read of each tensor


def fingerprint(model: InstructionModel) -> dict:
    """Names a model as it is loaded: another base, adapter, head, gate or precision gives other answers.

    Of every weight, `SAMPLES` values spread over it are hashed: training changes them all, and reading the whole of a
    7B model would take longer than an edit.

    Returns:
        `weights`, a hash; `dtype`; `clear_config`, the gate and everything else that `clear_config.json` says.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:  # as offloaded weights are
            values = tensor.detach().flatten()
            values = values[:: max(1, len(values) // SAMPLES)].contiguous()
            digest.update(values.view(torch.uint8).cpu().numpy().tobytes())
    # lora_alpha, without which the same matrices add something else.
    scales = [module.scaling for module in model.modules() if hasattr(module, "lora_A")]
    digest.update(repr(scales).encode())
    return {
        "weights": digest.hexdigest()[:16],
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "clear_config": asdict(model.clear_config),
    }
