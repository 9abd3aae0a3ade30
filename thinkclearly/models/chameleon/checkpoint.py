"""Chameleon checkpoints in: Anole, TwGI, and whatever was fine-tuned from them.

Everything becomes transformers' own `ChameleonForConditionalGeneration`, with three rules that the native class lacks:
its image tokenizer gets the decoder that the checkpoint holds, and keeps it when it is saved; it stays in float32
whatever the dtype (its codes depend on it); and no weight is ever left random.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, GenerationConfig

from thinkclearly.models.chameleon.decoder import VQDecoder
from thinkclearly.models.chameleon.processor import ChameleonProcessor
from thinkclearly.models.chameleon.vocabulary import image_ids
from thinkclearly.models.config_files import check_claims, config_errors
from thinkclearly.models.folder import check_adapter, read_model_config, weights_folder
from thinkclearly.models.native import load_native
from thinkclearly.models.weight_files import find_weights, open_weights

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
        quantization_config (*optional*): as in transformers. Only the layers are quantized unless it names
            `llm_int8_skip_modules` itself.
        device_map (*optional*): as in transformers. Parts may lie on several devices; all but the image tokenizer may
            be offloaded ("cpu" beside accelerators, "disk").

    Returns:
        `ChameleonForConditionalGeneration` in eval mode, whose `model.vqmodel` has got a `decoder`.

    Raises:
        FileNotFoundError: no such folder, config, weight file or shard.
        ValueError: another architecture, no decoder, a vocabulary that does not fit, whole weights and an adapter in
            one folder, or keys and shapes that do not match one to one.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"Both device={device!r} and device_map={device_map!r} were given; give one of them.")
    config_folder, config = read_model_config(name_or_path, revision, token)
    if config["model_type"] != "chameleon":
        raise ValueError(f"{name_or_path} is no Chameleon; load it with `load_checkpoint`.")
    folder = weights_folder(name_or_path, revision, token)
    check_adapter(folder, "chameleon")
    check_claims(folder, empty_chameleon(config, config_folder))
    _check_decoder(folder)
    network = load_native(
        _WithDecoder,
        folder,
        spared=_SPARED,
        offloadable=("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head."),
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        quantization_config=quantization_config,
        device_map=device_map,
    )
    vq = network.model.vqmodel
    vq.float().requires_grad_(False)
    vq.config.dtype = torch.float32
    # Settings are given, never inherited: some checkpoints bring temperature and top-p of their own.
    network.generation_config = GenerationConfig.from_model_config(network.config)
    network.config._name_or_path = network.name_or_path = str(name_or_path)
    return _as_native(network)


def empty_chameleon(config: dict, folder: Path) -> ChameleonForConditionalGeneration:
    """The model that a `config.json` describes, on the meta device; errors as in `load_chameleon`."""
    with config_errors(folder), torch.device("meta"):
        return chameleon_of(ChameleonConfig.from_dict(config), f"{folder}/config.json")


def chameleon_of(config: ChameleonConfig, where: str) -> ChameleonForConditionalGeneration:
    """A network with a decoder, as transformers initialises it.

    Args:
        where: names the config in errors.

    Raises:
        ValueError: its words for codes, its codebook and its vocabulary do not fit.
    """
    ids, codes = image_ids(config.vocabulary_map or {}, where), config.vq_config.num_embeddings
    if len(ids) != codes or max(ids) >= config.vocab_size:
        raise ValueError(
            f"{where}: vocabulary_map has {len(ids)} codes with token ids up to {max(ids)}; expected {codes} of them "
            f"(num_embeddings of vq_config) below {config.vocab_size} (vocab_size). Get the file again."
        )
    return _as_native(_WithDecoder(config))


def check_vocabulary(network: ChameleonForConditionalGeneration, processor: ChameleonProcessor, where: str) -> None:
    """Raises `ValueError` where tokenizer and config give a code, or the ends of a picture, different token ids."""
    config = network.config
    same = processor.code_ids == image_ids(config.vocabulary_map, where)
    for name in ("boi_token_id", "eoi_token_id"):  # of some configs
        same = same and getattr(config, name, None) in (None, getattr(processor, name.replace("_token", "")))
    if not same:
        raise ValueError(
            f"{where}: the tokenizer gives codes of pictures (IMGIMG…Z), or the tokens around them, other ids than "
            "config.json. Get the files that belong together."
        )


def _as_native(network: _WithDecoder) -> ChameleonForConditionalGeneration:
    network.__class__ = ChameleonForConditionalGeneration
    network.config.architectures = ["ChameleonForConditionalGeneration"]
    return network


def _check_decoder(folder: Path) -> None:
    for file in find_weights(folder):
        with open_weights(file) as (names, _, _):
            if any(".vqmodel.decoder." in name for name in names):
                return
    raise ValueError(
        f"{folder} has no weights of the image tokenizer's decoder (model.vqmodel.decoder.*), so it cannot draw. Meta "
        "published Chameleon without it (facebook/chameleon-7b), and transformers drops it when it saves. Anole and "
        "Thinking with Generated Images have one, in this layout, once their own transformers fork has converted them."
    )
