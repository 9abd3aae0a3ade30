"""Chameleon checkpoints in: Anole, TwGI, and whatever was fine-tuned from them.

Everything becomes transformers' own `ChameleonForConditionalGeneration`, with three rules that the native class lacks:
its image tokenizer gets the decoder that the checkpoint holds, and keeps it when it is saved; it stays in float32
whatever the dtype (its codes depend on it); and no weight is ever left random.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from thinkclearly.models.chameleon.decoder import VQDecoder
from thinkclearly.models.chameleon.vocabulary import image_ids
from thinkclearly.models.config_files import config_errors
from thinkclearly.models.folder import read_model_config, resolve
from thinkclearly.models.quantization import spare
from thinkclearly.models.weight_files import find_weights

_SPARED = ["model.embed_tokens", "model.vqmodel", "lm_head"]  # what quantization leaves alone: all but the layers


class _WithDecoder(ChameleonForConditionalGeneration):
    """Makes `from_pretrained` read the decoder, and the whole image tokenizer in float32."""

    _keep_in_fp32_modules_strict = ("vqmodel",)

    def __init__(self, config: ChameleonConfig):
        super().__init__(config)
        self.model.vqmodel.decoder = VQDecoder(config.vq_config)


def load_chameleon(
    name_or_path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    revision: str | None = None,
    token: str | None = None,
    attn_implementation: str | None = None,
    quantization_config=None,
    device_map=None,
) -> ChameleonForConditionalGeneration:
    """Loads a Chameleon that can draw: one whose image tokenizer has a decoder, as Anole's and TwGI's have.

    Args:
        name_or_path (`str` or `os.PathLike`): a folder, or a Hub id. Weights may be safetensors or `.bin`, in one file
            or in shards, with or without an index. No remote code is run.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of everything but the image tokenizer, which is
            float32, in eval mode and frozen whatever this says.
        device (`torch.device` or `str`, *optional*): where the model goes; the CPU by default.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        token (`str`, *optional*): for a private Hub id.
        attn_implementation (`str`, *optional*): as in transformers (`"sdpa"`, `"eager"`, …).
        quantization_config, device_map (*optional*): as in transformers. Only the layers of the language model are
            quantized unless `llm_int8_skip_modules` is named.

    Returns:
        `ChameleonForConditionalGeneration` in eval mode, whose `model.vqmodel` has got a `decoder`.

    Raises:
        FileNotFoundError: no such folder, config, weight file or shard.
        ValueError: another architecture, or keys and shapes that do not match one to one.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"Both device={device!r} and device_map={device_map!r} were given; give one of them.")
    folder, config = read_model_config(name_or_path, revision, token)
    if not Path(name_or_path).is_dir():
        folder = resolve(name_or_path, revision, token, ["*.safetensors"])
        if not any(folder.glob("*.safetensors")):
            folder = resolve(name_or_path, revision, token, ["*.bin"])
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the loading info tells, and with names
    if quantization_config is not None:
        options["quantization_config"] = spare(quantization_config, _SPARED)
        # Else transformers would quantize on the current GPU, whichever that is.
        device_map = device_map if device is None else {"": device}
    if find_weights(folder)[0].suffix == ".bin":  # else transformers prefers an index of safetensors that are absent
        options["use_safetensors"] = False
    with config_errors(folder):
        network, info = _WithDecoder.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map, **options
        )
    _check_keys(str(folder), info)
    network.__class__ = ChameleonForConditionalGeneration
    network.config.architectures = ["ChameleonForConditionalGeneration"]
    if device is not None and quantization_config is None:
        network = network.to(device)
    network.model.vqmodel.float().requires_grad_(False)
    network.model.vqmodel.config.dtype = torch.float32
    network.config._name_or_path = network.name_or_path = str(name_or_path)
    return network.eval()


def empty_chameleon(config: dict, folder: Path) -> ChameleonForConditionalGeneration:
    """The model that a `config.json` describes, on the meta device."""
    with config_errors(folder), torch.device("meta"):
        return chameleon_of(ChameleonConfig.from_dict(config))


def chameleon_of(config: ChameleonConfig) -> ChameleonForConditionalGeneration:
    """A network with a decoder and random weights."""
    image_ids(config.vocabulary_map or {}, "vocabulary_map of the config")
    network = _WithDecoder(config)
    network.__class__ = ChameleonForConditionalGeneration
    return network


def _check_keys(source: str, info: dict) -> None:
    problems = {name: sorted(map(str, info[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")}
    if problems["missing"] and all(".vqmodel.decoder." in key for key in problems["missing"]):
        raise ValueError(
            f"{source} has no weights of the image tokenizer's decoder (model.vqmodel.decoder.*), so it cannot draw: "
            "Meta published Chameleon without it, and transformers drops it when it saves. Anole and TwGI have one."
        )
    if any(problems.values()):
        lines = [f"{len(keys)} {name}: {'; '.join(keys[:5])}." for name, keys in problems.items() if keys]
        raise ValueError(f"The weights of {source} do not fit the model one to one.\n" + "\n".join(lines))
