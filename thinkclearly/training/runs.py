"""What a run is: its options, and fingerprints of its base, codebook and data. Every checkpoint keeps it as run.json.

Knows what may change while a run goes on. Does not know how anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from thinkclearly.files import is_local, strict

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
LENGTH = ("max_steps", "num_train_epochs")
# Names of what a fingerprint stands for: it may have moved.
NAMES = ("base_model", "adapter", "model_revision", "path", "photos_folder", "streaming")
EVALUATION = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start")

# What may change while a run goes on. Everything else counts as something that the weights depend on.
MAY_CHANGE = (
    *LENGTH,
    *NAMES,
    *EVALUATION,  # unless the class weight or the choice of the best checkpoint follows from evaluations
    # The records of an optimizer step count, not how they are shared out; see `records_per_step`.
    *("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"),
    # Memory, speed and the machine: the same sums, perhaps rounded in another way.
    *("attn_implementation", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cpu"),
    *("cache_features", "torch_empty_cache_steps", "full_determinism", "prepare_batch_size", "prepare_workers"),
    *("rows_per_forward", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_backend", "ddp_timeout"),
    *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_find_unused_parameters"),
    # What is measured and shown.
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *("batch_eval_metrics", "prediction_loss_only", "include_for_metrics", "sample_edits", "sample_sheets"),
    *("do_eval", "do_predict"),
    # Logging.
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "debug", "do_train"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics"),
    "include_num_input_tokens_seen",
    # Saving and sharing.
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("enable_jit_checkpoint", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push"),
    *("hub_revision", "share_samples"),
    # How to go on.
    *("ignore_data_skip", "restore_callback_states_from_checkpoint"),
)
# What of prepared records a fingerprint is made of.
WORDS = ("key", "instruction", "answer", "prompts", "scene", "edit", "response_start")
CODES = ("input_tokens", "output_tokens", "transformed_tokens", "content", "input_ids", "copied", "edit_of")
# Places of this machine, and what is of a single command.
_NOT_KEPT = ("output_dir", "prepared_dir", "resume_from_checkpoint", "overwrite_output_dir", "dry_run", "local_rank")


@dataclass
class Run:
    """What `run.json` holds.

    Args:
        options: every option of the recipe, and `records_per_step`; of local paths the last part only, since
            checkpoints are shared.
        editing: decoding settings that the checkpoint will bring along; no weight depends on them.
        fingerprints: what of → value; empty until base and data are loaded.
        changes: `{"step": 20, "max_steps": [20, 40], …}`, what was changed and after which step, where it was allowed.
    """

    options: dict
    editing: dict = field(default_factory=dict)
    fingerprints: dict = field(default_factory=dict)
    changes: list[dict] = field(default_factory=list)

    def is_same(self, other: Run | None) -> bool:
        """Whether `other` has the same options and fingerprints, whatever came before."""
        return other is not None and vars(self) == vars(other) | {"changes": self.changes}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def describe_run(training: TrainingArguments, parts: Iterable, editing: dict) -> Run:
    """A run without fingerprints.

    Args:
        parts: the other dataclasses of options.
    """
    options = {name: value for part in (*parts, training) for name, value in _options(part).items()}
    options = {name: _without_folders(name, value) for name, value in options.items()}
    records = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    options["records_per_step"] = records
    return Run(**json.loads(json.dumps(strict({"options": options, "editing": editing}))))


def read_run(directory: str | Path) -> Run | None:
    """The run that wrote a checkpoint or, where it has come to its end, an output folder; None without `run.json`."""
    path = Path(directory) / RUN_FILE
    if not path.is_file():
        return None
    try:
        run = Run(**json.loads(path.read_text(encoding="utf-8")))
        run.options["records_per_step"], run.fingerprints.items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} does not tell what was trained ({error!r}); give another output_dir.") from error
    return run


def check_unchanged(earlier: Run, now: Run, where: str | Path) -> None:
    """Raises `ValueError`, which names every difference that the weights depend on; none must go on as if the same."""
    differing = _differences(earlier.options, now.options)
    follows = now.options.get("tune_clear_weight") or now.options["load_best_model_at_end"]
    refused = {name for name in differing if name not in MAY_CHANGE or follows and name in EVALUATION}
    prints = _differences(earlier.fingerprints, now.fingerprints)
    if prints:
        refused |= differing.keys() & set(NAMES)
    if not refused and not prints:
        return
    lines = [f"  {name}: {then!r}, now {new!r}" for name, (then, new) in differing.items() if name in refused]
    lines += [f"  fingerprint of the {name}: {then}, now {new}" for name, (then, new) in prints.items()]
    raise ValueError(
        "\n".join([f"{where} was trained in another way:", *lines, "Nothing was changed. Give another output_dir, "])
        + "or the values of before to go on, or --overwrite_output_dir true to remove that run and start over."
    )


def allowed_changes(earlier: Run, now: Run, checkpoint: Path) -> list[dict]:
    """The changes of a run that goes on from `checkpoint`, those of before included; the new ones are logged.

    Raises:
        ValueError: the checkpoint is beyond the new end.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    step, schedule = state["global_step"], now.options["lr_scheduler_type"]
    steps, passes = (now.options[name] for name in LENGTH)
    if steps < step if steps > 0 else passes < state["epoch"]:
        raise ValueError(
            f"{checkpoint} is beyond the end, max_steps={steps}, num_train_epochs={passes}. Raise them, or give an "
            "earlier checkpoint as resume_from_checkpoint."
        )
    changes = _differences(earlier.options, now.options) | _differences(earlier.editing, now.editing)
    for name, (then, new) in changes.items():
        logger.info("From step %d on with %s=%s (before: %s)", step, name, new, then)
    constant = schedule in ("constant", "constant_with_warmup") and not 0 < now.options["warmup_steps"] < 1
    if not constant and not changes.keys().isdisjoint(LENGTH):
        logger.warning(
            "The learning rate of lr_scheduler_type=%s depends on the length of the run: up to step %d it followed "
            "the curve of the earlier length, now it follows that of the new one. A single run of the new length "
            "would end elsewhere; run.json keeps both.",
            *(schedule, step),
        )
    return [*earlier.changes, {"step": step, **changes}] if changes else earlier.changes


def data_fingerprint(rows: Dataset) -> str:
    """Of all that training reads of prepared records but their pictures, which the tokens stand for: SHA-256."""
    digest = hashlib.sha256()
    words = [name for name in WORDS if name in rows.column_names]
    for batch in rows.select_columns(words).iter(1000):
        for name in words:
            digest.update(json.dumps(batch[name]).encode())
    columns = [name for name in CODES if name in rows.column_names]
    # datasets cannot select none of a joined table's columns, which prompts that are drawn and rewarded may be.
    for batch in rows.select_columns(columns).with_format("numpy").iter(1000) if columns else ():
        for name in columns:
            values = [np.asarray(value, np.int32) for value in batch[name]]
            lengths = list(map(len, values))
            if len(set(lengths)) > 1:  # records show any number of pictures, and not all of them draw one
                digest.update(json.dumps(lengths).encode())
            digest.update(np.concatenate(values).tobytes())
    return digest.hexdigest()[:16]


def _options(part) -> dict:
    values = part.to_dict() if isinstance(part, TrainingArguments) else vars(part)
    return {name: value for name, value in values.items() if name not in _NOT_KEPT and not name.endswith("_token")}


def _without_folders(name: str, value):
    if isinstance(value, dict):
        return {key: _without_folders(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(name, item) for item in value]
    local = isinstance(value, str) and (Path(value).is_absolute() or name in NAMES and is_local(value))
    return Path(value).name if local else value


def _differences(then: dict, now: dict) -> dict[str, list]:
    """Of the names that both have: another version of a library may have more options."""
    return {name: [then[name], now[name]] for name in now if name in then and then[name] != now[name]}
