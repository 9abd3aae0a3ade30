"""Fine-tunes and bases read for inference, and adapters put back into a model that goes on training.

Knows every layout that a fine-tune comes in. Does not know how one is made.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict

from thinkclearly.models.adapter_config import matching_modules, read_adapter_config
from thinkclearly.models.folder import BY_NAME, TINY, resolve
from thinkclearly.models.instruction_head import (
    CONFIG_FILE,
    ClearConfig,
    InstructionModel,
    read_base_name,
    read_clear_config,
)
from thinkclearly.models.janus.original_finetune import (
    check_original_base,
    is_original_finetune,
    read_original_finetune,
)
from thinkclearly.models.load import Checkpoint, load_checkpoint
from thinkclearly.models.native import offloaded
from thinkclearly.models.protocol import Processor
from thinkclearly.models.weight_files import read_tensors

logger = logging.getLogger(__name__)

TINY_CLEAR = TINY.parent / "tiny_clear"  # the fine-tune that ships along
SHIPPED = "Using the tiny model that ships along (64-pixel pictures, drawn shapes)"


def load_finetune(model: InstructionModel, directory: str | Path) -> None:
    """Puts adapter, CLEAR head and class weight of `directory` into a model of the same shape (resuming)."""
    directory = Path(directory)
    if isinstance(model.network, PeftModel):
        _load_lora(model.network, _read_adapter(directory), directory)
    else:
        model.network.load_state_dict(load_checkpoint(str(directory)).network.state_dict())
    model.load_head(directory)
    model.clear_config.clear_weight = read_clear_config(directory).clear_weight


def load_clear_model(
    name_or_path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    merge: bool = False,
    **kwargs,
) -> tuple[InstructionModel, Processor]:
    """Loads a fine-tune for inference: ours, or the original's directory format.

    Args:
        name_or_path: folder or Hub id.
        base: base model to use instead of the one the adapter names.
        merge: add the adapter to the base's weights, which then decode faster; for editing only. Left undone where
            they are not float32: rounding would take small updates away.
        kwargs: `dtype`, `device`, …; see `load_checkpoint`.

    Raises:
        FileNotFoundError, ValueError: the CLEAR head is missing or belongs to another base; never random weights.
    """
    if str(name_or_path) == "tiny":
        raise ValueError(
            "'tiny' is the base model that ships along: it has no CLEAR head, so it cannot edit. For its fine-tune "
            "leave out --model (in Python: pipeline('clear-edit')); for another give the folder that "
            "`thinkclearly train` wrote or a Hub id."
        )
    directory = resolve(name_or_path, revision, token)
    if is_original_finetune(directory):
        lora, state, weight, bias = read_original_finetune(directory)
        checkpoint = _load_base_of(lora, base, directory, token=token, **kwargs)
        check_original_base(directory, checkpoint.network)
        with without_old_name():
            network = PeftModel(checkpoint.network, lora)
        _load_lora(network, state, directory)
        model = InstructionModel(network, ClearConfig(checkpoint.token_model.codebook_size))
        model.set_head(weight, bias, where=directory / "gen_head_clear.pt")
        return _ready(model, checkpoint, merge), checkpoint.processor
    if not (directory / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{name_or_path} has no {CONFIG_FILE} and no gen_head_clear.pt, so it holds no CLEAR head. Give a "
            "fine-tune made by `thinkclearly train`, or use load_base for a model that has not been fine-tuned."
        )
    config = read_clear_config(directory)
    if not (directory / "adapter_config.json").is_file():
        checkpoint = load_checkpoint(str(directory), **kwargs)
        model = InstructionModel(checkpoint.network, config)
    else:
        lora = _read_lora_config(directory)
        checkpoint = _load_base_of(lora, base, directory, token=token, **kwargs)
        return _ready(put_on(checkpoint, directory, lora), checkpoint, merge), checkpoint.processor
    _load_head(model, directory)
    return _ready(model, checkpoint, merge), checkpoint.processor


def put_on(checkpoint: Checkpoint, directory: str | Path, lora: LoraConfig | None = None) -> InstructionModel:
    """A base model with the adapter and the head of a fine-tune.

    Args:
        lora: the adapter's configuration; read from `directory` where not given.

    Raises:
        FileNotFoundError, ValueError: a part is missing, or belongs to another base.
    """
    directory, config = Path(directory), read_clear_config(directory)
    lora = lora or _read_lora_config(directory)
    if isinstance(lora.target_modules, str):
        modules = (name for name, _ in checkpoint.network.named_modules())
        lora.target_modules = matching_modules(lora.target_modules, modules, directory / "adapter_config.json")
    with without_old_name():
        network = PeftModel(checkpoint.network, lora)
    # Not PeftModel.from_pretrained: it leaves layers that the file does not have at random, without a word.
    _load_lora(network, _read_adapter(directory), directory)
    model = InstructionModel(network, config)
    found = model.token_model.base_fingerprint()
    if config.base_hash and found and found != config.base_hash:
        raise ValueError(
            f"{directory} was trained on base weights {config.base_hash}, {checkpoint.network.name_or_path} has "
            f"{found}: of the same shape, but another base. Pass the right one as base=."
        )
    _load_head(model, directory)
    return model


def _load_head(model: InstructionModel, directory: Path) -> None:
    """The CLEAR head, if the codebook is the one that it was trained with."""
    model.load_head(directory)
    found, config = model.token_model.codebook_fingerprint(), model.clear_config
    if config.codebook_hash and found != config.codebook_hash:
        raise ValueError(
            f"{directory} was trained on codebook {config.codebook_hash}, its base model now has {found}: not the "
            "base it belongs to. Pass the right one as base=."
        )


def load_base(name_or_path: str, **kwargs) -> tuple[InstructionModel, Processor]:
    """A base model without CLEAR head: draws, describes and edits, but never copies."""
    checkpoint = load_checkpoint(name_or_path, **kwargs)
    codes = checkpoint.token_model.codebook_size
    model = InstructionModel(checkpoint.network, ClearConfig(codes, instructions=[]))
    return _ready(model, checkpoint), checkpoint.processor


def load_any(
    name_or_path: str | Path, *, base: str | Path | None = None, **kwargs
) -> tuple[InstructionModel, Processor]:
    """A base model where there are only its own files, else a fine-tune.

    Args:
        name_or_path: folder or Hub id; or a file, a state dict with DeepSeek's names for the base.
        base: as for `load_clear_model`; needed for a state dict, an error for a base model.
        kwargs: as for `load_clear_model`.
    """
    name = str(name_or_path)
    if Path(name).is_file():
        if base is None:
            raise ValueError(
                f"{name} is a file of weights without config and tokenizer; give the model that they belong to as "
                "base, for example deepseek-ai/Janus-Pro-7B."
            )
        return load_base(str(base), weights=name, **kwargs)
    hub = {name: kwargs.get(name) for name in ("revision", "token")}
    directory = None if name in BY_NAME else resolve(name, **hub)
    finetuned = directory and ((directory / CONFIG_FILE).is_file() or is_original_finetune(directory))
    if finetuned or (directory and not (directory / "config.json").is_file()):
        return load_clear_model(name, base=base, merge=True, **kwargs)
    if base:
        raise ValueError(f"{name} is a base model, not a fine-tune; leave out base={base}")
    return load_base(name, **kwargs)


@contextmanager
def without_old_name() -> Iterator[None]:
    """PEFT asks for an attribute by a name that transformers 5 deprecates; nobody here can change that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _ready(model: InstructionModel, checkpoint: Checkpoint, merge: bool = False) -> InstructionModel:
    model.clear_head.to(next(model.base.lm_head.parameters()).device)
    layers = model.token_model.language_model.layers
    if merge and isinstance(model.network, PeftModel) and {p.dtype for p in layers.parameters()} == {torch.float32}:
        model.network.merge_adapter()
    return model.eval().requires_grad_(False)


def _load_base_of(lora: PeftConfig, base: str | Path | None, directory: Path, **kwargs) -> Checkpoint:
    """`base` where it is given, else the model (and revision) that the adapter names."""
    if base is None:
        lora.base_model_name_or_path = read_base_name(directory)
    if base is None and not lora.base_model_name_or_path:
        raise ValueError(f"{directory}/adapter_config.json names no base model; pass it as base=.")
    if base is None:
        base, kwargs = lora.base_model_name_or_path, kwargs | {"revision": lora.revision}
    checkpoint = load_checkpoint(base, **kwargs)
    if names := offloaded(checkpoint.network):  # PEFT would leave the adapter's matrices out, without a word
        raise ValueError(
            f"device_map offloads {names[0]} and {len(names) - 1} more of {base}; an adapter needs all of its base on "
            "devices. Merge the adapter (`thinkclearly push --merged native`) and load the result."
        )
    return checkpoint


def _read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (directory / name).is_file():
            return read_tensors(directory / name)
    raise FileNotFoundError(f"{directory} has no adapter_model.safetensors; the adapter is missing. Copy it there.")


def _read_lora_config(directory: Path) -> LoraConfig:
    """The adapter's configuration, unless it would take more room than the matrices beside it."""
    settings, state = read_adapter_config(directory), _read_adapter(directory)
    largest = max((tensor.shape[0] for name, tensor in state.items() if "lora_A" in name), default=0)
    ranks = [settings["r"], *settings.get("rank_pattern", {}).values()]
    if max(ranks) > largest:
        raise ValueError(
            f"{directory}/adapter_config.json has ranks {ranks}; the matrices beside it have {largest} at most. Get "
            "both again."
        )
    return LoraConfig(**settings, inference_mode=True)


def _load_lora(network: PeftModel, state: dict[str, torch.Tensor], directory: Path) -> None:
    """Every LoRA tensor of the model from `state` and nothing else in it, or an error."""
    try:
        result = set_peft_model_state_dict(network, state)
    except RuntimeError as error:  # shapes: one line each, below a title
        raise _misfit(directory, str(error).partition("\n")[2].strip().partition("\n")[0]) from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise _misfit(directory, f"it lacks {missing[:3]} and has {result.unexpected_keys[:3]} too many")


def _misfit(directory: Path, what: str) -> ValueError:
    return ValueError(
        f"{directory}: the adapter does not fit this base model: {what}. Pass the base it was trained on as base=."
    )
