"""Janus checkpoints in: native folders, DeepSeek's layout, and a DeepSeek model already in memory.

Everything becomes transformers' own `JanusForConditionalGeneration`, with three rules that the native classes lack:
the image tokenizer stays in float32 whatever the dtype (its ids depend on it), its codebook rows have unit length
(native encoding does not normalise them, DeepSeek's does), and no weight is ever left random.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration

from thinkclearly.models.config_files import check_claims, config_errors
from thinkclearly.models.folder import check_adapter, read_if_there, read_model_config, weights_folder
from thinkclearly.models.janus import deepseek
from thinkclearly.models.janus.meta import empty_janus
from thinkclearly.models.native import load_native, raise_problems
from thinkclearly.models.weight_files import find_weights, open_weights

logger = logging.getLogger(__name__)

# What quantization leaves alone, all but the language model, by whole names: transformers matches from their start.
_PARTS = ("vision_model", "aligner", "vqmodel", "generation_embeddings", "generation_aligner", "generation_head")
_SPARED = [*(f"model.{part}" for part in _PARTS), "lm_head"]


def load_janus(
    name_or_path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | None = None,
    attn_implementation: str | None = None,
    quantization_config=None,
    device_map=None,
    weights: str | os.PathLike | None = None,
) -> JanusForConditionalGeneration:
    """Loads a Janus model, converting DeepSeek's layout (`model_type: multi_modality`) while it reads.

    Args:
        name_or_path (`str` or `os.PathLike`): a folder, or a Hub id. Weights may be safetensors or `.bin`, in one file
            or in shards, with or without an index. No remote code is run.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of everything but the image tokenizer, which is
            float32, in eval mode and frozen whatever this says.
        device (`torch.device` or `str`, *optional*): where the model goes; the CPU by default.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        token (`str`, *optional*): for a private Hub id.
        attn_implementation (`str`, *optional*): as in transformers (`"sdpa"`, `"eager"`, …).
        quantization_config (*optional*): as in transformers, for native checkpoints. Modules outside the language
            model are left alone unless it names `llm_int8_skip_modules` itself.
        device_map (*optional*): as in transformers, for native checkpoints. Parts may lie on several devices; only the
            language model may be offloaded ("cpu" beside accelerators, "disk").
        weights (`str` or `os.PathLike`, *optional*): a file to read instead of the checkpoint's own weights: a whole
            state dict with DeepSeek's names (`.safetensors`, or what `torch.save` wrote). For checkpoints in
            DeepSeek's layout, of which only the small files are then needed.

    Returns:
        `JanusForConditionalGeneration` in eval mode. Peak memory is one copy of the weights and one tensor.

    Raises:
        FileNotFoundError: no such folder, config, weight file or shard.
        ValueError: another architecture (JanusFlow and deepseek-vl included), whole weights and an adapter in one
            folder, or keys and shapes that do not match one to one.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"Both device={device!r} and device_map={device_map!r} were given; give one of them.")
    folder, config = read_model_config(name_or_path, revision, token)
    model_type = config["model_type"]
    if model_type == "chameleon":
        raise ValueError(f"{name_or_path} is a Chameleon, not a Janus; load it with `load_checkpoint`.")
    if model_type == "multi_modality" and (quantization_config is not None or device_map is not None):
        raise ValueError(
            f"{name_or_path} is in DeepSeek's layout, which is converted tensor by tensor: quantization_config "
            "and device_map need a native checkpoint. Convert it with `thinkclearly convert` and load the result."
        )
    if weights is not None and model_type != "multi_modality":
        raise ValueError(
            f"{name_or_path} is in transformers' layout; a state dict such as {weights} belongs to a base in "
            "DeepSeek's. Give that one, for example deepseek-ai/Janus-Pro-7B."
        )
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"{weights} is no file; expected a state dict with DeepSeek's names.")
    if weights is None:
        folder = weights_folder(name_or_path, revision, token)
        check_adapter(folder, model_type)
    if model_type == "janus":
        check_claims(folder, empty_janus(config, folder))
        model = load_native(
            _Float32Tokenizer,
            folder,
            spared=_SPARED,
            offloadable=("model.language_model.", "lm_head."),
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            device_map=device_map,
        )
        model.__class__ = JanusForConditionalGeneration
        _finish(model)
    else:
        files = find_weights(folder) if weights is None else [Path(weights)]
        where = str(folder if weights is None else weights)
        model = _load_deepseek(files, config, where, dtype, device or "cpu", attn_implementation)
    model.config._name_or_path = model.name_or_path = str(name_or_path)
    _set_special_ids(model, folder)
    return model


def from_deepseek(model: nn.Module) -> JanusForConditionalGeneration:
    """A native copy of a DeepSeek `MultiModalityCausalLM` in memory, of its dtype and on its device.

    Only `model.config.to_dict()` and `model.state_dict()` are used: their `janus` package need not be importable here.

    Raises:
        ValueError: as in [`load_janus`].
    """
    state = model.state_dict()
    shapes = {key: (tuple(tensor.shape), "the model") for key, tensor in state.items()}
    config = json.loads(
        json.dumps(
            model.config.to_dict(), default=lambda value: dict(value) if isinstance(value, Mapping) else str(value)
        )
    )
    like = next((tensor for key, tensor in state.items() if key.startswith("language_model.")), torch.empty(0))
    return _convert(config, shapes, state.items(), "the model", like.dtype, like.device, None)


# ---- native ------------------------------------------------------------------------------------------------------


class _Float32Tokenizer(JanusForConditionalGeneration):
    """Makes `from_pretrained` read the image tokenizer in float32, not through the dtype of the rest."""

    _keep_in_fp32_modules_strict = ("vqmodel",)


def _finish(model: JanusForConditionalGeneration) -> JanusForConditionalGeneration:
    """The rules of this module about the image tokenizer; codebook rows that are unit already are left alone."""
    vq = model.model.vqmodel
    vq.float().requires_grad_(False)
    vq.config.dtype = torch.float32
    codebook = vq.quantize.embedding.weight.data
    rows = (codebook.norm(dim=-1) - 1).abs() > 1e-6
    codebook[rows] = F.normalize(codebook[rows], p=2, dim=-1)
    return model.eval()


# ---- DeepSeek's layout -------------------------------------------------------------------------------------------


def _load_deepseek(files, config, source, dtype, device, attn_implementation) -> JanusForConditionalGeneration:
    shapes = {}
    for file in files:
        with open_weights(file) as (names, shape, _):
            for key in names:
                if key in shapes:
                    raise ValueError(f"{key!r} is in both {shapes[key][1]} and {file.name} of {source}; remove one.")
                shapes[key] = (shape(key), file.name)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for file in files:
            with open_weights(file) as (names, _, read):
                for key in names:
                    yield key, read(key)

    return _convert(config, shapes, tensors(), source, dtype, device, attn_implementation)


def _convert(config, shapes, tensors, source, dtype, device, attn_implementation) -> JanusForConditionalGeneration:
    """`shapes` maps each DeepSeek key to (shape, file name); `tensors` yields each key and its tensor once."""
    with config_errors(source):
        native = deepseek.native_config(config, {key: shape for key, (shape, _) in shapes.items()}, source)
        model = _empty_model(native, dtype, attn_implementation)
    _check_keys(model, shapes, source)
    for key, tensor in tensors:
        for name, part in deepseek.to_native(key, tensor).items():
            owner, _, leaf = name.rpartition(".")
            wanted = torch.float32 if name.startswith("model.vqmodel.") else dtype
            part = part.to(device, wanted, copy=True, memory_format=torch.contiguous_format)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(part))
    owners = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        setattr(owners[owner], leaf, torch.empty_like(buffer, device=device))
    for owner in owners.values():  # rotary frequencies and position ids: modules that hold no weights of their own
        model._init_weights(owner)
    return _finish(model)


def _empty_model(config: JanusConfig, dtype, attn_implementation) -> JanusForConditionalGeneration:
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):  # in float32, for the sake of the rotary buffers
        model = JanusForConditionalGeneration._from_config(config, dtype=torch.float32, **kwargs)
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part.dtype = dtype
    model.config.architectures = ["JanusForConditionalGeneration"]
    return model


def _check_keys(model, shapes, source):
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {"missing": [], "unexpected": [], "mismatched": []}
    found = set()
    for key, (shape, file) in shapes.items():
        parts = deepseek.to_native(key, torch.empty(shape, device="meta"))
        if parts is None or not parts.keys() <= expected.keys():
            problems["unexpected"].append(f"{key} (in {file})")
            continue
        found |= parts.keys()
        if wrong := {name: tuple(t.shape) for name, t in parts.items() if tuple(t.shape) != expected[name]}:
            name, part = next(iter(wrong.items()))
            problems["mismatched"].append(
                f"{key} {shape} (in {file}): native {name} would be {part}, config and other weights make it "
                f"{expected[name]}"
            )
    problems["missing"] = sorted({deepseek.deepseek_key(name) for name in expected.keys() - found})
    raise_problems(source, problems)


# ---- ids ---------------------------------------------------------------------------------------------------------


def _set_special_ids(model: JanusForConditionalGeneration, folder: Path):
    """Ids differ between checkpoints: they come from the tokenizer files by string; native `generate` needs them."""
    tokenizer, tokenizer_config = (
        read_if_there(folder / "tokenizer.json"),
        read_if_there(folder / "tokenizer_config.json"),
    )
    ids = {item["content"]: int(i) for i, item in tokenizer_config.get("added_tokens_decoder", {}).items()}
    ids |= {item["content"]: item["id"] for item in tokenizer.get("added_tokens", [])}
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, dict):
        ids = vocabulary | ids
    if not ids:
        if "image_token_id" not in read_if_there(folder / "config.json"):
            logger.warning(
                "%s has no tokenizer files: image_token_id is a guess, %d.", folder, model.config.image_token_id
            )
        return
    tag = read_if_there(folder / "processor_config.json").get("image_tag", deepseek.IMAGE_TAG)
    if tag not in ids:
        raise ValueError(f"The tokenizer in {folder} has no token {tag!r}; a Janus tokenizer must have it.")
    model.config.image_token_id = ids[tag]

    generation = model.generation_config
    for name in ("bos", "eos", "pad"):
        text = tokenizer_config.get(f"{name}_token") or read_if_there(folder / "special_tokens_map.json").get(
            f"{name}_token"
        )
        text = text["content"] if isinstance(text, dict) else text
        if text in ids:
            setattr(generation, f"{name}_token_id", ids[text])
    if deepseek.PAD_TAG in ids:
        generation.pad_token_id = ids[deepseek.PAD_TAG]
    if deepseek.BOI_TAG in ids:
        kwargs = getattr(generation, "generation_kwargs", None) or {}
        generation._from_model_config = False  # or reading it back drops the next line
        generation.generation_kwargs = kwargs | {"boi_token_id": ids[deepseek.BOI_TAG]}
