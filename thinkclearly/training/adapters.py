"""What learns: LoRA on a model's parts, or the parts themselves."""

from __future__ import annotations

import re
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn

from thinkclearly.models.finetunes import put_on, without_old_name
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.load import Checkpoint


def add_lora(
    checkpoint: Checkpoint, base_name: str, config: ClearConfig, parts: tuple[str, ...] = (), **lora
) -> InstructionModel:
    """A trainable `InstructionModel`: LoRA inside the frozen base, and a fresh CLEAR head.

    Args:
        base_name: written into the adapter's configuration, so that PEFT finds the base again.
        parts: names of `TokenModel.parts()` whose linear layers are adapted; the family's `learning_parts` if empty.
        lora: fields of `peft.LoraConfig` (`r`, `lora_alpha`, `lora_dropout`, `use_dora`, `use_rslora`, …).
    """
    config_of_lora = LoraConfig(target_modules=lora_targets(checkpoint, parts), **lora)
    with without_old_name():
        network = get_peft_model(checkpoint.network, config_of_lora)
    network.peft_config["default"].base_model_name_or_path = base_name
    return InstructionModel(network, config)


def go_on_with(checkpoint: Checkpoint, base_name: str, directory: str | Path, config: ClearConfig) -> InstructionModel:
    """A trainable `InstructionModel` that starts as the fine-tune in `directory`.

    Args:
        base_name: as for `add_lora`.
        config: what the new checkpoints will say about themselves.
    """
    model = put_on(checkpoint, directory)
    if (taught := model.clear_config.instructions) != config.instructions:
        raise ValueError(
            f"adapter={directory} has the instruction tokens {taught}, this run is to have {config.instructions}; "
            "they must be the same to go on"
        )
    model.clear_config = config
    model.network.peft_config["default"].inference_mode = False
    model.network.peft_config["default"].base_model_name_or_path = base_name
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("clear_head."))
    return model


def train_fully(checkpoint: Checkpoint, config: ClearConfig, parts: tuple[str, ...] = ()) -> InstructionModel:
    """An `InstructionModel` without adapter: the CLEAR head and `parts` learn, the rest is frozen.

    Args:
        parts: names of `TokenModel.parts()`; the family's `learning_parts` if empty.
    """
    model = InstructionModel(checkpoint.network.requires_grad_(False), config)
    for part in _chosen(checkpoint, parts).values():
        part.requires_grad_(True)
    return model


def lora_targets(checkpoint: Checkpoint, parts: tuple[str, ...] = ()) -> str:
    """A pattern of the linear layers in the parts, by full name: suffixes would match the vision tower's as well."""
    names = {module: name for name, module in checkpoint.network.named_modules()}
    patterns = []
    for part in _chosen(checkpoint, parts).values():
        prefix = names[part]
        linear = [name for module, name in names.items() if isinstance(module, nn.Linear) and name.startswith(prefix)]
        if not linear:
            continue
        leaves = sorted({name.rpartition(".")[2] for name in linear})
        inner = "" if prefix in linear else rf"\.(.+\.)?({'|'.join(map(re.escape, leaves))})"
        patterns.append(re.escape(prefix) + inner)
    return "|".join(patterns)


def _chosen(checkpoint: Checkpoint, parts: tuple[str, ...]) -> dict[str, nn.Module]:
    family = checkpoint.token_model
    known = {name: part for name, part in family.parts().items() if name != family.tokenizer_part}
    unknown = sorted(set(parts) - set(known))
    if unknown:
        raise ValueError(f"train_parts: {', '.join(unknown)}; choose from {', '.join(known)}")
    return {name: known[name] for name in parts or family.learning_parts}
