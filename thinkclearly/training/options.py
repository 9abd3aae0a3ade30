"""What a training recipe holds for every method; a method's own options stand in its file."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from thinkclearly.data.options import DataArguments
from thinkclearly.files import is_local
from thinkclearly.recipe import CODE, DTYPES, LEFT_OUT, check_choice, option

# Of the machine, the moment or an account, not of the model; and aliases, whose values the new names carry.
_NOT_SHARED = (
    *("output_dir", "prepared_dir", "prepare_workers", "run_name", "resume_from_checkpoint", "dry_run"),
    *("use_cpu", "do_eval", "disable_tqdm", "local_rank", "project", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "include_num_input_tokens_seen", "share_samples", "overwrite_output_dir"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
)
_PATHS = ("base_model", "adapter", "path", "prompts_path", "photos_folder")


@dataclass
class Options:
    """What one training run was asked for.

    Args:
        method: the options of the method, an instance of its module's `Arguments`.
        settings: decoding settings that were given; the checkpoint brings them along.
    """

    model: ModelArguments
    lora: LoraArguments
    data: DataArguments
    method: Any
    training: RunArguments
    settings: dict


def effective_recipe(options: Options) -> dict:
    """The options of a run as a recipe that others can use: no paths of this machine, nothing of the Hub account.

    All of our own options are in it, of transformers' only those that were changed. Whoever repeats the run has to
    give what is `LEFT_OUT`; `RecipeParser` asks for it.
    """
    recipe = {}
    for part in (options.model, options.lora, options.data, options.method, options.training):
        own = type(part).__annotations__
        for f in fields(part):
            name, value = f.name, _plain(getattr(part, f.name))
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if name in _NOT_SHARED or "hub" in name.split("_"):
                continue
            if value in (None, "", [], {}) and default in (None, "", "none", [], {}):
                continue
            if name not in own and value == default:
                continue
            local = _has_absolute_path(value) or name in _PATHS and is_local(value) or name in CODE
            recipe[name] = LEFT_OUT if local else value
    return recipe | options.settings


def _plain(value):
    """What YAML can hold of an option's value."""
    if isinstance(value, AcceleratorConfig):
        default = AcceleratorConfig().to_dict()
        return {name: item for name, item in value.to_dict().items() if item != default[name]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _has_absolute_path(value) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_absolute_path, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and Path(value).is_absolute()


@dataclass
class ModelArguments:
    """The model to start from."""

    base_model: str = option(
        "tiny", "Folder or Hub id of a Janus (either layout) or Chameleon model; 'tiny', a Janus, ships along."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of the base model on the Hub.")
    dtype: str = option(
        "float32", "Type of the base model's weights: float32, bfloat16 or float16. The VQ stays float32."
    )
    attn_implementation: str | None = option(
        None, "eager, sdpa or flash_attention_2; transformers' choice if not given."
    )
    load_in_4bit: bool = option(False, "Load the frozen language model in 4 bits (bitsandbytes): QLoRA.")

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)


@dataclass
class LoraArguments:
    """The adapter."""

    lora_r: int = option(8, "Rank of the LoRA matrices; 0 trains the parts themselves.")
    lora_alpha: int = option(16, "LoRA scaling numerator.")
    lora_dropout: float = option(0.05, "Dropout before the LoRA matrices.")
    use_dora: bool = option(False, "Weight-decomposed LoRA (DoRA).")
    use_rslora: bool = option(False, "Scale by the square root of the rank (rsLoRA).")
    adapter: str | None = option(
        None, "Fine-tune to start from, folder or Hub id: its adapter goes on, with its rank and parts."
    )
    train_parts: list[str] = option(
        [], "Parts that learn; the language model and the image head if not given. A wrong name lists all."
    )

    def __post_init__(self):
        if self.lora_r < 0:
            raise ValueError(f"lora_r={self.lora_r}; expected a rank of 1 or more, or 0 to train without LoRA")
        if self.adapter and self.lora_r == 0:
            raise ValueError(f"adapter={self.adapter} with lora_r=0: an adapter goes on as one; leave lora_r out")


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of the original's recipe."""

    method: str = option("clear", "What is taught, and how; `thinkclearly train --help` lists the methods.")
    output_dir: str | None = option(
        None, "Where checkpoints, samples and the final adapter are written; outputs/METHOD if not given."
    )
    learning_rate: float = option(5e-5, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = option("constant", "Learning rate schedule.")
    num_train_epochs: float = option(1.0, "Passes over the data.")
    per_device_train_batch_size: int = option(1, "Records per device and step.")
    per_device_eval_batch_size: int = option(4, "Records per device in evaluation.")
    max_grad_norm: float = option(1.0, "Gradient clipping.")
    logging_steps: float = option(10, "Log every so many steps.")
    eval_strategy: str = option("steps", "no, steps or epoch.")
    eval_steps: float | None = option(100, "Evaluate every so many steps.")
    save_steps: float = option(100, "Save a checkpoint every so many steps.")
    save_total_limit: int | None = option(2, "Checkpoints that are kept.")
    remove_unused_columns: bool = option(False, "Must stay off: the collator reads columns that the model does not.")
    prediction_loss_only: bool = option(True, "Evaluation keeps no logits.")
    label_names: list[str] | None = option(["labels"], "Column of the labels.")
    report_to: list[str] | str | None = option("none", "tensorboard, trackio, wandb, or none.")
    share_samples: bool | None = option(
        None, "push_to_hub: share the sample edits, too; if not given, only those of public data."
    )
    overwrite_output_dir: bool = option(
        False, "Start over: first remove the checkpoints and results that an earlier run left in output_dir."
    )
    dry_run: bool = option(False, "Print the memory that the run will need, component by component, and stop.")

    def __post_init__(self):
        # A recipe written for a GPU runs where there is none, too.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.report_to = self.report_to or "none"
        self.output_dir = self.output_dir or f"outputs/{self.method}"
        super().__post_init__()
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("overwrite_output_dir starts over, resume_from_checkpoint goes on; give one of them")
        for tracker in set(self.report_to) & {"tensorboard", "trackio", "wandb"}:
            if find_spec(tracker) is None:
                raise ValueError(f"report_to={tracker}: not installed; pip install 'thinkclearly[{tracker}]'")
