"""From options to the model of a training run; every method builds on it."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState

from thinkclearly.data.features import FeatureCache, cache_features
from thinkclearly.data.splits import PreparedData
from thinkclearly.files import is_local
from thinkclearly.models.folder import resolve
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel, read_clear_config
from thinkclearly.models.load import Checkpoint, load_checkpoint
from thinkclearly.models.quantization import quantization
from thinkclearly.training.adapters import add_lora, go_on_with, train_fully
from thinkclearly.training.options import ModelArguments, Options


def build_checkpoint(model: ModelArguments) -> Checkpoint:
    """The base model of a training run, on this process's device."""
    dtype = getattr(torch, model.dtype)
    return load_checkpoint(
        model.base_model,
        revision=model.model_revision,
        dtype=dtype,
        device=PartialState().device,
        attn_implementation=model.attn_implementation,
        quantization_config=quantization(4, dtype) if model.load_in_4bit else None,
    )


def new_config(
    checkpoint: Checkpoint, settings: dict, instructions: list[str], clear_weight: float = 1.0
) -> ClearConfig:
    """What the checkpoints of a run will say about themselves.

    Args:
        settings: decoding settings that the checkpoint brings along.
    """
    family = checkpoint.token_model
    return ClearConfig(
        codebook_size=family.codebook_size,
        instructions=list(instructions),
        clear_weight=clear_weight,
        codebook_hash=family.codebook_fingerprint(),
        base_hash=family.base_fingerprint(),
        edit=settings,
    )


def adapter_config(options: Options) -> ClearConfig | None:
    """What the fine-tune that training starts from says about itself; None where it starts from a base model."""
    return read_clear_config(resolve(options.lora.adapter)) if options.lora.adapter else None


def build_model(options: Options, checkpoint: Checkpoint, config: ClearConfig) -> InstructionModel:
    """Makes the checkpoint trainable: LoRA, or full fine-tuning when `lora_r` is 0."""
    model, lora = options.model, options.lora
    if lora.lora_r == 0:
        if model.load_in_4bit:
            raise ValueError("lora_r=0 with load_in_4bit: weights in 4 bits cannot learn; give one of them up")
        return train_fully(checkpoint, config, tuple(lora.train_parts))
    base = str(Path(model.base_model).absolute()) if is_local(model.base_model) else model.base_model
    if lora.adapter:
        return go_on_with(checkpoint, base, resolve(lora.adapter), config)
    return add_lora(
        checkpoint,
        base,
        config,
        tuple(lora.train_parts),
        revision=model.model_revision,
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )


def stored_features(options: Options, model: InstructionModel, processor, data: PreparedData) -> FeatureCache | None:
    """What the frozen tower makes of the pictures, where `cache_features` asks for it."""
    if not options.data.cache_features:
        return None
    parts = [part for part in (data.train, data.test) if part is not None]
    return cache_features(parts, model, processor, options.data.prepared_dir)
