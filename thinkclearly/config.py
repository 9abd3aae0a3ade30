"""Dataclasses of what a training recipe holds; the only place where its defaults live."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from thinkclearly.recipe import DTYPES, LEFT_OUT, check_choice, option

SOURCES = ("shapes", "magicbrush", "folder", "sharegpt4o", "jsonl", "prepared")
# Data options that not every source can use: given to another one, they would be ignored.
_USED_BY = {
    **dict.fromkeys(("shapes_size", "photos_folder"), ("shapes",)),
    **dict.fromkeys(("split", "turn_index", "streaming"), ("magicbrush",)),
    **dict.fromkeys(("path", "shuffle", "include", "exclude", "match"), SOURCES[1:]),
    **dict.fromkeys(
        ("clear_label", "pixel_tolerance", "cache_features"), tuple(name for name in SOURCES if name != "jsonl")
    ),
}

# Of the machine, the moment or an account, not of the model; and aliases, whose values the new names carry.
_NOT_SHARED = (
    *("output_dir", "prepared_dir", "prepare_workers", "run_name", "resume_from_checkpoint", "dry_run"),
    *("use_cpu", "do_eval", "disable_tqdm", "local_rank", "project", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "include_num_input_tokens_seen", "share_samples", "overwrite_output_dir"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
)
_PATHS = ("base_model", "path", "photos_folder")


def is_local(name: str) -> bool:
    """Whether a model or data set is a file or folder of this machine, rather than a Hub id or built in."""
    return name != "tiny" and (Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists())


def effective_recipe(*options) -> dict:
    """The options of a run as a recipe that others can use: no paths of this machine, nothing of the Hub account.

    All of our own options are in it, of transformers' only those that were changed. Whoever repeats the run has to
    give what is `LEFT_OUT`; `RecipeParser` asks for it.
    """
    recipe = {}
    for part in options:
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
            local = _has_absolute_path(value) or name in _PATHS and is_local(value)
            recipe[name] = LEFT_OUT if local else value
    return recipe


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
        "tiny", "Folder or Hub id of a Janus model, native or DeepSeek format; 'tiny' ships along."
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

    lora_r: int = option(8, "Rank of the LoRA matrices; 0 trains the language model and the generation head whole.")
    lora_alpha: int = option(16, "LoRA scaling numerator.")
    lora_dropout: float = option(0.05, "Dropout before the LoRA matrices.")
    use_dora: bool = option(False, "Weight-decomposed LoRA (DoRA).")
    use_rslora: bool = option(False, "Scale by the square root of the rank (rsLoRA).")

    def __post_init__(self):
        if self.lora_r < 0:
            raise ValueError(f"lora_r={self.lora_r}; expected a rank of 1 or more, or 0 to train without LoRA")


@dataclass
class DataArguments:
    """Where the photo pairs come from and how they are labelled."""

    source: str = option(
        "shapes",
        "shapes (built in), magicbrush, folder (sample_XXXX), sharegpt4o (JSON), jsonl, or prepared (tokenized).",
    )
    path: str | None = option(None, "Folder, file or Hub id of the data; not needed for shapes.")
    split: str = option("train", "Split of a Hub data set.")
    limit: int | None = option(None, "Use at most this many records.")
    shuffle: bool = option(False, "Shuffle the records before the limit is taken.")
    include: list[str] = option([], "Keep records whose instruction holds these words.")
    exclude: list[str] = option([], "Leave out records whose instruction holds these words.")
    match: str = option("any", "Whether any or all of the words above must be there.")
    turn_index: int | None = option(None, "MagicBrush: keep this turn only.")
    streaming: bool = option(False, "MagicBrush: read the data set as a stream, without downloading it whole.")
    shapes_size: int = option(64, "shapes: side of the rendered pictures, pixels.")
    photos_folder: str | None = option(
        None, "shapes: draw on the photographs of this folder instead of the packaged ones."
    )
    eval_samples: int = option(50, "Records held out for evaluation; 0 for none.")
    calibration_edits: int = option(
        64, "Records held out to calibrate the gate; neither trained on nor reported. 0 for none."
    )
    clear_label: str = option("pixels", "Where CLEAR is the label: equal tokens, pixels, or outside the human mask.")
    pixel_tolerance: int = option(16, "clear_label=pixels: largest difference of an unchanged patch, of 255.")
    on_bad_record: str = option("error", "error stops at a bad record, skip leaves it out and lists it.")
    prepared_dir: str = option("outputs/prepared", "Where tokenized data is kept and found again.")
    cache_features: bool = option(
        False, "Keep what the frozen vision tower makes of each source picture, in prepared_dir: needs disk space."
    )
    prepare_batch_size: int = option(16, "Pairs that are tokenized at once.")
    prepare_workers: int | None = option(
        None, "Processes that read pictures beside the encoder; if not given, 4 for a GPU and none for a CPU."
    )
    split_seed: int = option(42, "Seed of shuffling, of the held-out split and of the built-in shapes.")

    def __post_init__(self):
        check_choice("source", self.source, SOURCES)
        check_choice("match", self.match, ("any", "all"))
        check_choice("clear_label", self.clear_label, ("tokens", "pixels", "mask"))
        check_choice("on_bad_record", self.on_bad_record, ("error", "skip"))
        if self.source != "shapes" and not self.path and self.source != "magicbrush":
            raise ValueError(f"source: {self.source} needs path: the folder or file to read")
        for name, least in (("limit", 1), ("eval_samples", 0), ("calibration_edits", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value}; expected {least} or more")
        defaults = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(self)}
        for name, known in _USED_BY.items():
            if self.source not in known and (value := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} means nothing for source: {self.source}; it is for {', '.join(known)}"
                )
        if self.split != "train" and (self.path or "").endswith(".parquet"):
            raise ValueError(f"split={self.split!r}: {self.path} is a single file and has no splits; leave it out")


@dataclass
class ClearArguments:
    """The CLEAR objective and what is watched while training."""

    clear_weight: float = option(0.3, "Class weight of CLEAR in the loss; inference takes its logarithm off again.")
    tune_clear_weight: bool = option(False, "The original's auto-tuning: move the weight after each evaluation.")
    drop_all: float = option(0.1, "Share of rows that see neither picture nor words (trains the uncond row).")
    drop_source: float = option(0.5, "Share of the other rows that do not see the source codes (trains the part row).")
    clear_head_lr: float | None = option(None, "Learning rate of the CLEAR linear; learning_rate if not given.")
    sample_edits: int = option(4, "Held-out pictures that are edited and saved at each evaluation; 0 for none.")

    def __post_init__(self):
        if not 0 < self.clear_weight < math.inf:
            raise ValueError(f"clear_weight={self.clear_weight}; expected a positive number, 1 for no re-weighting")
        for name in ("drop_all", "drop_source"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected a share between 0 and 1")


@dataclass
class ClearTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of the original's recipe."""

    output_dir: str = option("outputs/clear", "Where checkpoints, samples and the final adapter are written.")
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
        super().__post_init__()
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("overwrite_output_dir starts over, resume_from_checkpoint goes on; give one of them")
        for tracker in set(self.report_to) & {"tensorboard", "trackio", "wandb"}:
            if find_spec(tracker) is None:
                raise ValueError(f"report_to={tracker}: not installed; pip install 'thinkclearly[{tracker}]'")
