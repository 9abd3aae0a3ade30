"""The memory that a training run will need, component by component, counted without weights.

Parameters come from a model on the meta device; activations from a forward pass over tensors that have a shape and no
memory, which tells what autograd would keep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from thinkclearly.decoding.engine import MAX_BLOCK, guided_rows
from thinkclearly.editing.settings import EditSettings
from thinkclearly.models.config_files import read_json
from thinkclearly.models.cross_entropy import chunk_length
from thinkclearly.models.folder import resolve
from thinkclearly.models.instruction_head import ADAPTER_FILE, ClearConfig, InstructionModel
from thinkclearly.models.load import Checkpoint, load_empty
from thinkclearly.models.protocol import TokenModel
from thinkclearly.models.stream import StreamModel
from thinkclearly.training.grpo import GrpoArguments
from thinkclearly.training.interleaved import InterleavedArguments
from thinkclearly.training.options import Options
from thinkclearly.training.setup import adapter_config, build_model

WORDS = 64  # tokens of instruction and template beside the picture's and the source's slots
NF4 = 0.5 + (1 + 4 / 256) / 64  # bytes a weight: 4 bits, and doubly quantized scales of 64 weights each
GIB = 2**30


@dataclass
class Part:
    """One component: how many parameters it has, where that means something, and its bytes on one device."""

    name: str
    parameters: int | None
    bytes: float


def weights(model: InstructionModel, dtype: torch.dtype, in_4bit: bool = False) -> list[Part]:
    """The weights of each part of the base, the adapter, the CLEAR head and a `StreamModel`'s projection.

    Args:
        model: on the meta device.
        dtype: of the base; the image tokenizer is float32 anyway, and so is everything that is added.
        in_4bit: whether the frozen matrices of the language model's layers are.
    """
    parts: dict[str, Part] = {}
    family = model.token_model
    matrices = {id(m.weight) for m in family.language_model.layers.modules() if isinstance(m, nn.Linear)}
    for part, module in family.parts().items():
        for name, parameter in module.named_parameters():
            small = in_4bit and id(parameter) in matrices
            lora = "lora_" in name
            size = 4 if lora or part == family.tokenizer_part else NF4 if small else dtype.itemsize
            row = parts.setdefault("LoRA" if lora else part, Part("LoRA" if lora else part, 0, 0))
            row.parameters += parameter.numel()
            row.bytes += parameter.numel() * size
    lora = [parts.pop("LoRA")] if "LoRA" in parts else []
    added = {"CLEAR head": model.clear_head}
    if isinstance(model, StreamModel):
        added["projection"] = model.projection
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in added.items()}
    return [*parts.values(), *lora, *(Part(name, count, 4 * count) for name, count in counts.items())]


def learning(model: InstructionModel, dtype: torch.dtype, state_bytes: int | None = None) -> list[Part]:
    """Gradients, and AdamW's two states of each trainable parameter: `state_bytes` each, else of the weight's type."""
    count, total = 0, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            count += parameter.numel()
            small = "lora_" in name or name.startswith(("clear_head", "projection"))
            total += parameter.numel() * (4 if small else dtype.itemsize)
    return [
        Part("gradients", count, total),
        Part("optimizer states", None, 2 * (total if state_bytes is None else count * state_bytes)),
    ]


@dataclass
class Samples:
    """What GRPO draws and learns from at a time: counted as if every record were a pair, where pictures are drawn.

    Attributes:
        count: samples of a batch.
        rows: guided rows of each, when it is drawn.
        forward_rows: rows of one forward and backward pass.
        edits: whether a source is shown.
        block: positions of the longest block.
    """

    count: int
    rows: int
    forward_rows: int
    edits: bool
    block: int

    @classmethod
    def of(cls, options: Options) -> Samples:
        grpo, edits = options.method, options.method.task == "edit"
        found = adapter_config(options)
        settings = replace(EditSettings(), **((found.edit if found else {}) | options.settings))
        rows = len(guided_rows(settings, has_source=edits))
        count = options.training.per_device_train_batch_size * (1 if edits else 2) * grpo.num_generations
        scored = 1 if grpo.logprob_scale == "cond" else rows
        return cls(count, rows, scored * min(grpo.rows_per_forward or count, count), edits, settings.block)


def drawing(family: TokenModel, samples: Samples, classes: int, dtype: torch.dtype) -> list[Part]:
    """Keys and values of all rows of a batch's samples, and their noise; gone when the forward pass begins.

    Args:
        classes: K + I.
        dtype: of keys and values.
    """
    config, n = family.language_model.config, family.grid**2
    capacity = n + min(samples.block or MAX_BLOCK, n)
    slots = (shown_length(family) if samples.edits else 0) + WORDS + capacity
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * samples.count * samples.rows * slots * width * dtype.itemsize
    noise = samples.count * capacity * classes * torch.float32.itemsize
    return [Part("keys and values", None, cache), Part("noise", None, noise)]


def activations(
    model: InstructionModel,
    batch_size: int,
    autocast: torch.dtype | None,
    checkpointing: bool,
    with_source: bool = True,
    stream: int = 0,
) -> list[Part]:
    """What the forward pass keeps for the backward pass, for one batch on one device.

    Args:
        model: on the meta device; takes its dtypes from there and loses its own parameters to shapes.
        batch_size: rows.
        with_source: whether they show a picture, or words alone.
        stream: tokens of a row of a `StreamModel`; 0 for rows that draw one picture.
        autocast: type of mixed precision, if any.
        checkpointing: only the inputs of the layers are kept; one layer at a time is computed again.
    """
    family = model.token_model
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
            return tensor

        batch = stream_batch(family, batch_size, stream) if stream else example_batch(family, batch_size, with_source)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
        ):
            model(**batch)
    classes, positions = model.vocabulary.num_classes, batch_size * family.grid**2
    if stream:
        classes, positions = family.language_model.config.vocab_size, len(batch["word_labels"])
    length = chunk_length(positions)
    # The last chunk's softmax is among what is kept, the rest of its three parts comes when the backward pass begins.
    softmax = 4 * classes * (positions - length * ((positions - 1) // length))
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in own) - softmax
    layers = family.language_model.config.num_hidden_layers
    if checkpointing:
        inputs = layers * batch["input_ids"].numel() * family.hidden_size
        total = inputs * (autocast or model.base.dtype).itemsize + total / layers
    return [Part("activations", None, total), Part("logits, softmax, gradient", None, 3 * 4 * classes * length)]


def shown_length(family: TokenModel) -> int:
    """Positions of a picture in a prompt: its features and its codes, or its codes alone where there is no tower."""
    return family.grid**2 * (1 if family.tower_part == family.tokenizer_part else 2)


def example_batch(family: TokenModel, batch_size: int, with_source: bool = True) -> dict[str, torch.Tensor]:
    """The inputs of `InstructionModel.forward` for one batch, all zeros, with `WORDS` tokens beside the slots."""
    n, side = family.grid**2, family.image_size
    length = (shown_length(family) if with_source else 0) + n + WORDS - 1
    ids, codes = (torch.zeros(batch_size, length, dtype=torch.long) for length in (length, n))
    slots = torch.zeros(batch_size, int(with_source), dtype=torch.long)
    pictures = {"source_tokens": codes, "pixel_values": torch.zeros(batch_size, 3, side, side)} if with_source else {}
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "seen_slots": slots,
        "known_slots": slots,
        "pictures": slots,
        "drawn_slots": torch.zeros(batch_size, dtype=torch.long),
        "labels": codes,
        **pictures,
    }


def stream_batch(family: TokenModel, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """The inputs of `StreamModel.forward` for one batch of streams of `length` tokens, as many pictures as fit."""
    n, pictures = family.grid**2, max(1, (length - WORDS) // (family.grid**2 + 2))
    ids, labelled = torch.zeros(batch_size, length, dtype=torch.long), torch.zeros(batch_size * length).long()
    drawn, none = torch.ones(batch_size * pictures).long(), torch.zeros(0).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **dict.fromkeys(("word_rows", "word_columns", "word_labels"), labelled),
        **dict.fromkeys(("picture_rows", "picture_columns"), drawn),
        "picture_codes": drawn.new_zeros(len(drawn), n),
        **dict.fromkeys(("edit_rows", "edit_columns"), none),
        "edit_labels": none.new_zeros(0, n),
    }


def table(parts: list[Part]) -> str:
    """Plain text, one line a component and one for the sum."""
    lines = [f"{'component':28}{'parameters':>16}{'GiB':>10}"]
    for part in [*parts, Part("total", None, sum(part.bytes for part in parts))]:
        count = "" if part.parameters is None else f"{part.parameters:,}"
        lines.append(f"{part.name:28}{count:>16}{part.bytes / GIB:>10.3f}")
    return "\n".join(lines) + "\n"


def estimate_memory(options: Options, method) -> str:
    """A table of the memory that a run will need on one device, without loading any weights.

    Args:
        method: a module with `instructions`; see `training.clear`.
    """
    network, training = load_empty(options.model.base_model, options.model.model_revision), options.training
    dtype, checkpoint = getattr(torch, options.model.dtype), Checkpoint(network, None)
    family = checkpoint.token_model
    for name in (*options.lora.train_parts, *family.learning_parts):  # what learns, and what its gradients cross
        if name in family.parts():
            family.parts()[name].to(dtype)
    config = ClearConfig(family.codebook_size, instructions=method.instructions(options))
    lora = options.lora
    if lora.adapter:  # whose weights are not loaded: one like it
        rank = read_json(resolve(lora.adapter) / ADAPTER_FILE)["r"]
        lora = replace(lora, adapter=None, lora_r=rank)
    with torch.device("meta"):
        model = build_model(replace(options, lora=lora), checkpoint, config)
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    size, with_source, stream, notes = training.per_device_train_batch_size, True, 0, ""
    if isinstance(options.method, InterleavedArguments):
        stream, notes = options.data.max_stream - 1, f"A record is a stream of {options.data.max_stream - 1} tokens.\n"
        with torch.device("meta"):
            model = StreamModel.of(model)
    held = weights(model, dtype, options.model.load_in_4bit)
    gradients, states = learning(model, dtype, 1 if "8bit" in training.optim else None)
    held += [gradients, states]
    samples = Samples.of(options) if isinstance(options.method, GrpoArguments) else None
    if samples:
        size, with_source = samples.forward_rows, samples.edits
        if options.method.beta:
            held.append(replace(gradients, name="reference"))
        drawn = drawing(family, samples, model.vocabulary.num_classes, autocast or dtype)
        notes = (
            f"{samples.count} samples of {samples.rows} row(s) are drawn before, and take in place of activations and "
            f"logits {sum(part.bytes for part in drawn) / GIB:.3f} GiB for "
            f"{' and '.join(f'{part.name} ({part.bytes / GIB:.3f})' for part in drawn)}. "
            "Under FSDP2 the weights are whole meanwhile.\n"
        )
    used = activations(model, size, autocast, training.activation_checkpointing, with_source, stream)
    frozen = sum(part.bytes for part in held if part.name == family.tokenizer_part)
    sliced = (sum(part.bytes for part in held) - frozen) / 8 + frozen + sum(part.bytes for part in used)
    return (
        f"{options.model.base_model}: estimate for one device, {size} {'row' if samples else 'record'}(s) at a time, "
        f"activation checkpointing {'on' if training.activation_checkpointing else 'off'}\n\n{table(held + used)}\n"
        f"{notes}"
        f"With weights, gradients and states in slices over 8 devices (FSDP2, ZeRO 3): {sliced / GIB:.2f} GiB "
        "each.\nNot counted: the CUDA context, buffers of communication, fragmentation, and evaluation.\n"
    )
