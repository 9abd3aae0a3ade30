"""Fine-tunes made by the original ThinkClearly (peterN908/ThinkClearly, 3_sft_finetune.py), for native Janus models.

That script leaves a PEFT adapter with DeepSeek's module names, and `gen_head_clear.pt`: the state of its
`GenHeadWithClear`, which is the CLEAR linear and a second copy of the whole generation head with its LoRA. The adapter
has the head's LoRA twice as well, as `gen_head.*` and as `gen_head_clear.base_head.*`, two names of one module.
4_simple_inference.py loads `gen_head_clear.pt` last, so its copy is what the model computes with.
"""

import json
import logging
import math
import os
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import JanusForConditionalGeneration

from thinkclearly.models.adapter_config import lora_settings, read_adapter_config
from thinkclearly.models.config_files import read_json
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.janus.deepseek import deepseek_key, to_native
from thinkclearly.models.weight_files import open_weights, read_tensors

logger = logging.getLogger(__name__)

HEAD_FILE = "gen_head_clear.pt"
_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_HEAD_LINEARS = ("output_mlp_projector", "vision_head")
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *_HEAD_LINEARS)


def is_original_finetune(directory: str | os.PathLike) -> bool:
    """Whether a folder is a fine-tune of the original script, complete or not."""
    directory = Path(directory)
    if not (directory / "adapter_config.json").is_file():
        return False
    if (directory / HEAD_FILE).is_file() or (directory / "clear_meta.json").is_file():
        return True
    targets = read_json(directory / "adapter_config.json").get("target_modules")
    return isinstance(targets, list) and any(str(name).endswith("output_mlp_projector") for name in targets)


def read_original_finetune(
    directory: str | os.PathLike,
) -> tuple[LoraConfig, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Reads an original fine-tune for use on the native model of the same base.

    Args:
        directory (`str` or `os.PathLike`): holds `adapter_config.json`, `adapter_model.safetensors` (or `.bin`) and
            `gen_head_clear.pt`.

    Returns:
        `(config, lora, weight, bias)`: a `LoraConfig` whose targets are full native names (the original's suffixes
        would also match SigLIP's `q_proj`); the LoRA tensors under the names that `set_peft_model_state_dict` takes on
        a `PeftModel` over `JanusForConditionalGeneration`; the CLEAR linear, float32 (1, H) and (1,).

    Raises:
        FileNotFoundError: a file is missing; nothing is ever left random.
        ValueError: not a plain LoRA, or tensors of other names and shapes than that script writes.
    """
    directory = Path(directory)
    settings = read_adapter_config(directory)
    _check_plain(settings, directory)
    head = _read_head(directory)
    pairs = _read_lora(directory)

    for name in _HEAD_LINEARS:
        saved = {matrix: head.get(f"base_head.{name}.lora_{matrix}.default.weight") for matrix in "AB"}
        copies = [
            {matrix: tensor for matrix, tensor in saved.items() if tensor is not None},
            pairs.pop(f"gen_head_clear.base_head.{name}", {}),
            pairs.pop(f"gen_head.{name}", {}),
        ]
        copies = [copy for copy in copies if copy]
        if not copies:
            continue
        used = copies[0]
        if any(m in used and not torch.equal(used[m].float(), t.float()) for c in copies[1:] for m, t in c.items()):
            logger.warning(
                "%s: the copies of the LoRA of gen_head.%s differ; using the one the original's inference loads last.",
                directory,
                name,
            )
        pairs[f"gen_head.{name}"] = used

    state, targets = {}, []
    rank = settings["r"]
    for name, pair in sorted(pairs.items()):
        native = to_native(f"{name}.weight", torch.empty(0, device="meta"))
        if not native or not name.startswith(("language_model.model.layers.", "gen_head.")):
            raise ValueError(
                f"{directory} adapts {name!r}; the original script adapts the language model's layers and the "
                "generation head only."
            )
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != rank or pair["B"].shape[-1] != rank:
            found = {f"lora_{matrix}": tuple(tensor.shape) for matrix, tensor in sorted(pair.items())}
            raise ValueError(
                f"{directory}: {name} has {found}; expected lora_A ({rank}, in) and lora_B (out, {rank}), since "
                f"adapter_config.json says r={rank}."
            )
        target = next(iter(native)).removesuffix(".weight")
        targets.append(target)
        for matrix, tensor in pair.items():
            state[f"base_model.model.{target}.lora_{matrix}.weight"] = tensor
    if not targets:
        raise ValueError(f"{directory} has no LoRA tensors; expected some for the language model.")

    weight, bias = head["clear_linear.weight"].float(), head["clear_linear.bias"].float()
    widths = {pair["A"].shape[1] for name, pair in pairs.items() if name.endswith(("q_proj", _HEAD_LINEARS[0]))}
    if weight.shape[0] != 1 or bias.shape != (1,) or any(weight.shape[1] != width for width in widths):
        raise ValueError(
            f"{directory / HEAD_FILE}: clear_linear has weight {tuple(weight.shape)} and bias {tuple(bias.shape)}; "
            f"the adapter is for hidden size {sorted(widths)}, so (1, hidden) and (1,) were expected. The two files "
            "belong to different fine-tunes."
        )
    config = LoraConfig(
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        r=rank,
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout", 0.0),
        use_rslora=settings.get("use_rslora", False),
        target_modules=targets,
    )
    return config, state, weight, bias


def check_original_base(directory: str | os.PathLike, model: JanusForConditionalGeneration):
    """Checks that `model` is the base the fine-tune in `directory` was trained on, by its own copy of the head.

    Raises:
        ValueError: `gen_head_clear.pt` holds other generation head weights than `model`.
    """
    head, ours = _read_head(Path(directory)), model.model.generation_head
    for name, module in zip(_HEAD_LINEARS, (ours.proj_out, ours.vision_head)):
        module: nn.Linear = getattr(module, "base_layer", module)
        saved = next((head[key] for key in _base_names(name) if key in head), None)
        if saved is None:
            continue
        weight = module.weight.detach().cpu()
        # One of the two may have been rounded to half precision.
        if saved.shape != weight.shape or not torch.allclose(saved.float(), weight.float(), rtol=1e-2, atol=1e-4):
            raise ValueError(
                f"{Path(directory) / HEAD_FILE} was trained on a base whose {name} is {tuple(saved.shape)}; the "
                f"generation head of {model.name_or_path or 'this model'} is {tuple(weight.shape)} or has other "
                "values. Load the base that the fine-tune was made from."
            )


def write_original_finetune(model: InstructionModel, directory: str | os.PathLike) -> None:
    """Writes a fine-tune as the original script does, for that script; [`read_original_finetune`] reads it back.

    The correction for the class weight and the calibrated bias, of which that format knows nothing, go into the CLEAR
    linear's bias; the calibrated temperature, which does not move the gate's zero, is lost.

    Raises:
        ValueError: another adapter than plain LoRA, or more than one instruction token.
    """
    if not isinstance(model.network, PeftModel):
        raise ValueError("The original format is an adapter's; this model was fine-tuned whole.")
    network, clear_head, directory = model.network, model.clear_head, Path(directory)
    config = network.peft_config["default"]
    settings = {**config.to_dict(), "inference_mode": True, "task_type": "FEATURE_EXTRACTION"}
    settings |= {"peft_type": config.peft_type.value, "target_modules": sorted(_TARGETS), "auto_mapping": None}
    _check_plain(lora_settings(settings, directory), directory)
    if clear_head.out_features != 1:
        raise ValueError(f"The model has {clear_head.out_features} instruction tokens; the original format holds one.")
    head = {f"clear_linear.{name}": tensor.float() for name, tensor in clear_head.state_dict().items()}
    clear = model.clear_config
    head["clear_linear.bias"] = head["clear_linear.bias"] - math.log(clear.clear_weight) + clear.gate_bias
    for key, tensor in network.get_base_model().model.generation_head.state_dict().items():
        head[deepseek_key(f"model.generation_head.{key}").replace("gen_head.", "base_head.")] = tensor
    adapter = {}
    for key, tensor in get_peft_model_state_dict(network, save_embedding_layers=False).items():
        name = deepseek_key(key.removeprefix("base_model.model."))
        copies = [name, f"gen_head_clear.base_head.{name.removeprefix('gen_head.')}"]
        for copy in copies if name.startswith("gen_head.") else copies[:1]:
            adapter[f"base_model.model.{copy}"] = tensor.detach().cpu().contiguous().clone()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(adapter, directory / "adapter_model.safetensors", {"format": "pt"})
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in head.items()}, directory / HEAD_FILE)
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    (directory / "clear_meta.json").write_text(json.dumps({"has_clear_head": True}), encoding="utf-8")


def _check_plain(settings: dict, directory: Path):
    unsupported = {
        name: settings[name] for name in ("rank_pattern", "alpha_pattern", "use_dora") if settings.get(name)
    }
    if unsupported:
        raise ValueError(
            f"{directory}/adapter_config.json has {unsupported}; the original script writes a plain LoRA. Load this "
            "adapter with PEFT itself."
        )


def _base_names(name: str) -> tuple[str, str]:
    return f"base_head.{name}.base_layer.weight", f"base_head.{name}.weight"


def _read_head(directory: Path) -> dict[str, torch.Tensor]:
    path = directory / HEAD_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no {HEAD_FILE}, which holds the trained CLEAR linear: without it CLEAR would be decided "
            "by random weights. Copy it from the training output."
        )
    head = read_tensors(path)
    if missing := {"clear_linear.weight", "clear_linear.bias"} - set(head):
        raise ValueError(
            f"{path} has {len(head)} tensors but not {', '.join(sorted(missing))}; it holds no CLEAR linear."
        )
    known = re.compile(r"clear_linear\.(weight|bias)|base_head\.(output_mlp_projector|vision_head)\..+")
    if unknown := sorted(key for key in head if not known.fullmatch(key)):
        raise ValueError(f"{path} has {', '.join(unknown[:5])}; expected clear_linear and base_head tensors only.")
    return head


def _read_lora(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """LoRA matrices by DeepSeek's module name: `{module: {"A": (r, in), "B": (out, r)}}`."""
    files = [directory / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{directory} has neither {files[0].name} nor {files[1].name}; the adapter is missing."
        )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    with open_weights(file) as (names, _, read):
        for key in names:
            match = _LORA.fullmatch(key)
            if match is None:
                raise ValueError(f"{file} has {key!r}; expected LoRA tensors only (….lora_A.weight, ….lora_B.weight).")
            pairs.setdefault(match[1], {})[match[2]] = read(key).clone()
    return pairs
