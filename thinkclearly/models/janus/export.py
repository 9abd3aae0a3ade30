"""A native Janus model out into DeepSeek's layout."""

import copy
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import JanusForConditionalGeneration

from thinkclearly.models.folder import TOKENIZER_FILES, read_if_there, resolve
from thinkclearly.models.janus import deepseek

logger = logging.getLogger(__name__)

_PROCESSOR_FILES = {"preprocessor_config.json": "image_processor_type", "processor_config.json": "processor_class"}
_CODEBOOK_USED = 65536  # length of a usage buffer which DeepSeek's strict loading expects


def export_deepseek(
    model: JanusForConditionalGeneration,
    directory: str | os.PathLike,
    processor_source: str | os.PathLike | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a native model in DeepSeek's layout: `config.json`, processor files and safetensors shards.

    Loading the result gives the same native weights bit by bit. DeepSeek's classes load it too, but for SigLIP's
    pooling head (`attn_pool`), which Janus never uses and native checkpoints do not have: pass them `strict=False`.

    Args:
        model (`JanusForConditionalGeneration`): the model; adapters merged, not quantised.
        directory (`str` or `os.PathLike`): a new or empty folder. It appears under this name only when complete.
        processor_source (`str` or `os.PathLike`, *optional*): folder or Hub id from which the tokenizer files are
            copied, and the processor files if they are DeepSeek's.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): largest weight file.

    Returns:
        `Path`: the folder.

    Raises:
        TypeError: not a native Janus model. ValueError: a quantised one. FileExistsError: the folder is not empty.
    """
    if not isinstance(model, JanusForConditionalGeneration):
        raise TypeError(
            f"Expected a JanusForConditionalGeneration, got {type(model).__name__}. Merge adapters first "
            "(`merge_and_unload`)."
        )
    state = model.state_dict()
    with torch.device("meta"):
        plain = JanusForConditionalGeneration(copy.deepcopy(model.config)).state_dict()
    if getattr(model, "is_quantized", False) or state.keys() != plain.keys():
        raise ValueError(
            "The model is quantised or has adapters in it, which DeepSeek's layout cannot hold (other than plain: "
            f"{', '.join(sorted(state.keys() ^ plain.keys())[:3]) or 'dtypes'}). Load it unquantised and merge the "
            "adapters."
        )
    groups: dict[str, list[str]] = {}
    for key in state:
        groups.setdefault(deepseek.deepseek_key(key), []).append(key)
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder; give another one or remove it.")

    def tensor(key, device=None):
        if key not in groups:
            return torch.zeros(_CODEBOOK_USED, device=device)
        return deepseek.to_deepseek(key, [state[name].detach().to(device or "cpu") for name in groups[key]])

    keys = sorted([*groups, "gen_vision_model.quantize.codebook_used"])
    plan = split_torch_state_dict_into_shards(
        {key: tensor(key, "meta") for key in keys}, max_shard_size=max_shard_size
    )
    files = deepseek.processor_configs(model.config)
    files["config.json"] = deepseek.deepseek_config(model.config, model.lm_head.weight.dtype)
    if plan.is_sharded:
        files["model.safetensors.index.json"] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}

    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if processor_source is not None:
            _copy_processor(resolve(processor_source, patterns=("*.json", *TOKENIZER_FILES)), partial)
        for name, members in plan.filename_to_tensors.items():
            # clone: safetensors refuses tensors that share memory, as a tied head does
            save_file({key: tensor(key).contiguous().clone() for key in members}, partial / name, {"format": "pt"})
        partial.chmod(0o755)
        os.replace(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("Wrote %d tensors in DeepSeek's layout to %s", len(keys), directory)
    return directory


def _copy_processor(source: Path, target: Path):
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, target / file.name)
    for name, field in _PROCESSOR_FILES.items():
        if (source / name).is_file() and str(read_if_there(source / name).get(field)).startswith("VL"):
            shutil.copy(source / name, target / name)
