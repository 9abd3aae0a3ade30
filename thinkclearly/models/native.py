"""transformers' own checkpoints in, for every family, with what all of them must keep: no weight is ever left random.

Knows no family: which parts may be quantized or offloaded is what a family says.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from thinkclearly.models.config_files import config_errors
from thinkclearly.models.quantization import spare
from thinkclearly.models.weight_files import find_weights

Network = TypeVar("Network", bound=PreTrainedModel)


def load_native(
    kind: type[Network],
    folder: Path,
    *,
    spared: list[str],
    offloadable: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device | str | None,
    attn_implementation: str | None,
    quantization_config,
    device_map,
) -> Network:
    """A model of class `kind`, in eval mode, each key of whose weights is accounted for.

    Args:
        spared: names of modules that quantization leaves alone; whole ones, as transformers matches from their start.
        offloadable: beginnings of the names of parameters that `device_map` may offload.

    Raises:
        ValueError: keys and shapes that do not match one to one, or an offloaded part that may not be.
    """
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the loading info tells, and with names
    if quantization_config is not None:
        options["quantization_config"] = spare(quantization_config, spared)
        # Else transformers would quantize on the current GPU, whichever that is.
        device_map, device = device_map if device is None else {"": device}, None
    if find_weights(folder)[0].suffix == ".bin":  # else transformers prefers an index of safetensors that are absent
        options["use_safetensors"] = False
    with config_errors(folder):
        network, info = kind.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map, **options
        )
    raise_problems(
        str(folder), {name: sorted(map(str, info[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")}
    )
    if needed := [name for name in offloaded(network) if not name.startswith(offloadable)]:
        raise ValueError(
            f"device_map offloads {needed[0]} and {len(needed) - 1} more; only the language model can be offloaded. "
            "Give the other parts a device."
        )
    return (network if device is None else network.to(device)).eval()


def offloaded(network: nn.Module) -> list[str]:
    """Parameters that accelerate keeps elsewhere and brings in for their module's computation only."""
    return [name for name, parameter in network.named_parameters() if parameter.is_meta]


def raise_problems(source: str, problems: dict[str, list[str]]) -> None:
    """Raises `ValueError` where there are any: lists of keys that are missing, unexpected, mismatched, …"""
    problems = {name: keys for name, keys in problems.items() if keys}
    if not problems:
        return
    lines = [f"The weights of {source} do not fit the model one to one."]
    for name, keys in problems.items():
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        lines.append(f"{len(keys)} {name}: {'; '.join(keys[:5])}{more}.")
    lines.append("Check that config.json belongs to these weights and that every file was downloaded in full.")
    raise ValueError("\n".join(lines))
