"""`adapter_config.json` of a fine-tune: what it may hold, settled before PEFT builds anything of it.

Knows PEFT's fields. Does not know which weights lie beside the file.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from pathlib import Path

import regex
from peft import LoraConfig

from thinkclearly.models.config_files import read_config

_PATTERN_LENGTH, _PATTERN_SECONDS = 4096, 2.0  # CPU seconds; an honest pattern takes milliseconds


def _rank(value) -> bool:
    return type(value) is int and value > 0


def _number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _flag(value) -> bool:
    return type(value) is bool


def _text(value) -> bool:
    return type(value) is str


def _by_module(valid):
    # PEFT reads these names as regular expressions; without operators they cannot run away.
    return lambda value: (
        type(value) is dict and all(re.fullmatch(r"\^?[\w.]+", k) and valid(v) for k, v in value.items())
    )


def _modules(value) -> bool:
    if type(value) is str:
        return 0 < len(value) <= _PATTERN_LENGTH
    return type(value) is list and all(type(name) is str and re.fullmatch(r"[\w.]+", name) for name in value)


# The fields that plain LoRA and DoRA compute with.
_USED = {
    "r": ("a rank of 1 or more", _rank),
    "lora_alpha": ("a number", _number),
    "lora_dropout": ("a number", _number),
    "use_rslora": ("true or false", _flag),
    "use_dora": ("true or false", _flag),
    "rank_pattern": ("ranks by module names", _by_module(_rank)),
    "alpha_pattern": ("numbers by module names", _by_module(_number)),
    "target_modules": (f"module names, or a pattern of at most {_PATTERN_LENGTH} characters", _modules),
    "base_model_name_or_path": ("text", _text),
    "revision": ("text", _text),
}
# Fields that change nothing. All others change the computation, import modules or read further files.
_INERT = ("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode")
_OFF = {"bias": ["none"], "init_lora_weights": [True, "gaussian"], "megatron_core": ["megatron.core"]}
_OFF["qalora_group_size"] = [16]


def read_adapter_config(directory: str | Path) -> dict:
    """What [`lora_settings`] finds in the `adapter_config.json` of a folder.

    Raises:
        FileNotFoundError: no such file. ValueError: as [`lora_settings`].
    """
    path = Path(directory) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no {path.name}; expected a fine-tune folder of ThinkClearly.")
    return lora_settings(read_config(path, known=LoraConfig.__dataclass_fields__), path)


def lora_settings(content: dict, where: str | Path) -> dict:
    """The fields of an adapter's configuration that plain LoRA or DoRA computes with: keywords of `peft.LoraConfig`.

    Raises:
        ValueError: another method, a field that should be off, or one of another kind; the message names it.
    """
    if content.get("peft_type") != "LORA":
        raise ValueError(
            f"{where} has peft_type {content.get('peft_type')!r:.60}; expected plain LoRA or DoRA ('LORA')."
        )
    for name, value in content.items():
        if name not in _USED and name not in _INERT and value and value not in _OFF.get(name, []):
            raise ValueError(
                f"{where} has {name} {value!r:.60}; expected plain LoRA or DoRA, where it is off. Such an adapter "
                "works with PEFT itself only."
            )
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if content.get(name) is None]:
        raise ValueError(f"{where} lacks {', '.join(missing)}. Get it again.")
    used = {name: content[name] for name in _USED if content.get(name) is not None}
    for name, value in used.items():
        expected, valid = _USED[name]
        if not valid(value):
            raise ValueError(f"{where} has {name} {value!r:.60}; expected {expected}. Get it again.")
    return used


def matching_modules(pattern: str, modules: Iterable[str], where: str | Path) -> list[str]:
    """The modules that a `target_modules` pattern matches whole.

    PEFT would match without a limit, and a regular expression can take longer than anyone waits.

    Raises:
        ValueError: not a regular expression, one that takes too long, or one that matches no module.
    """
    end, found = time.process_time() + _PATTERN_SECONDS, []
    try:
        compiled = regex.compile(pattern)
        for module in modules:
            if compiled.fullmatch(module, timeout=max(0.0, end - time.process_time())):
                found.append(module)
    except (TimeoutError, regex.error, RecursionError) as error:
        raise ValueError(
            f"{where}: target_modules is {pattern!r:.60}, a pattern that cannot be used ({error}). Write the names of "
            "the modules as a list."
        ) from error
    if not found:
        raise ValueError(f"{where}: target_modules is {pattern!r:.60}, which matches no module of the base model.")
    return found
