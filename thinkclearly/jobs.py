"""The jobs behind the command line: each takes parsed options and puts the rooms together.

Knows every room but the command line itself.
"""

from __future__ import annotations

import logging
import platform
import re
import signal
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from thinkclearly.config import (
    ClearArguments,
    ClearTrainingArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    effective_recipe,
    is_local,
)
from thinkclearly.data import sources
from thinkclearly.data.collator import EditCollator
from thinkclearly.data.features import cache_features
from thinkclearly.data.shapes import random_edit
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.settings import SettingOverrides, given
from thinkclearly.evaluation.calibration import calibrate
from thinkclearly.evaluation.edits import Evaluation, evaluate_edits
from thinkclearly.evaluation.pictures import sheet
from thinkclearly.files import write_text
from thinkclearly.hub.card import RECIPE_FILE, write_card
from thinkclearly.hub.trainer import PublishingTrainer
from thinkclearly.models.backbone import Backbone, base_hash, codebook_hash, load_backbone
from thinkclearly.models.clear_head import ClearConfig, ClearEditModel, write_clear_config
from thinkclearly.models.empty import empty_janus
from thinkclearly.models.quantization import quantization
from thinkclearly.splits import PreparedData, build_data
from thinkclearly.training import memory
from thinkclearly.training.adapters import add_lora, train_fully
from thinkclearly.training.callbacks import (
    CollapseAlarm,
    EpochOfDropout,
    SampleEdits,
    SaveOnSigterm,
    Speed,
    TuneClearWeight,
)
from thinkclearly.training.checkpoints import EarlierRun, start_over
from thinkclearly.training.runs import RUN_FILE, data_fingerprint, describe_run
from thinkclearly.training.trainer import ClearEditTrainer

logger = logging.getLogger(__name__)

# What a training recipe may hold, in the order of `train`'s parameters.
TRAIN_OPTIONS = (
    ModelArguments,
    LoraArguments,
    DataArguments,
    ClearArguments,
    ClearTrainingArguments,
    SettingOverrides,
)


def build_backbone(model: ModelArguments) -> Backbone:
    """The base model of a training run, on this process's device."""
    dtype = getattr(torch, model.dtype)
    return load_backbone(
        model.base_model,
        revision=model.model_revision,
        dtype=dtype,
        device=PartialState().device,
        attn_implementation=model.attn_implementation,
        quantization_config=quantization(4, dtype) if model.load_in_4bit else None,
    )


def build_model(model: ModelArguments, lora: LoraArguments, backbone: Backbone, config: ClearConfig) -> ClearEditModel:
    """The backbone with what the options let learn: LoRA, or with rank 0 the weights themselves."""
    if lora.lora_r == 0:
        if model.load_in_4bit:
            raise ValueError("lora_r=0 with load_in_4bit: weights in 4 bits cannot learn; give one of them up")
        return train_fully(backbone, config)
    return add_lora(
        backbone,
        str(Path(model.base_model).absolute()) if is_local(model.base_model) else model.base_model,
        config,
        revision=model.model_revision,
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )


def new_config(backbone: Backbone, clear: ClearArguments, overrides) -> ClearConfig:
    """What the checkpoint of a run will say about itself."""
    return ClearConfig(
        codebook_size=backbone.model.config.vq_config.num_embeddings,
        clear_weight=clear.clear_weight,
        codebook_hash=codebook_hash(backbone.model),
        base_hash=base_hash(backbone.model),
        edit=given(overrides),
    )


def build_trainer(
    kind: type[ClearEditTrainer],
    model: ClearEditModel,
    collator: EditCollator,
    data: PreparedData,
    clear: ClearArguments,
    training: ClearTrainingArguments,
    *callbacks: TrainerCallback,
) -> ClearEditTrainer:
    """A trainer with the objective that the options describe; `callbacks` run besides those that it needs."""
    trainer = kind(
        model=model,
        processor=collator.processor,
        clear_weight=clear.clear_weight,
        clear_head_lr=clear.clear_head_lr,
        data_collator=collator,
        args=training,
        train_dataset=data.train,
        eval_dataset=data.test,
        callbacks=[EpochOfDropout(collator), *callbacks],
    )
    if clear.tune_clear_weight:
        trainer.add_callback(TuneClearWeight(trainer))
    return trainer


def train(
    model_args: ModelArguments,
    lora: LoraArguments,
    data_args: DataArguments,
    clear: ClearArguments,
    training: ClearTrainingArguments,
    overrides,
) -> list[dict]:
    """Prepares what is not prepared, trains (going on from the last checkpoint), evaluates and saves.

    Returns:
        What was logged. A run that has come to its end already is left as it is.

    Raises:
        ValueError: `output_dir` holds a run that was trained in another way; see `training.runs`.
    """
    if training.push_to_hub and lora.lora_r and is_local(model_args.base_model):
        raise ValueError(
            f"push_to_hub: nobody else can load the adapter's base {model_args.base_model}. Give a Hub id as "
            "base_model, or leave push_to_hub out and then use `thinkclearly push DIR --base_model_id owner/name`."
        )
    output = Path(training.output_dir)
    run = describe_run(training, (model_args, lora, data_args, clear), given(overrides))
    earlier = EarlierRun(training)
    earlier.check(run)  # what needs no model and no data to be refused
    set_seed(training.seed)
    backbone = build_backbone(model_args)
    data = build_data(data_args, backbone)
    config = new_config(backbone, clear, overrides)
    run.fingerprints = _fingerprints(config, data, run.options["base_model"])
    if earlier.is_finished(run):
        logger.info("%s: this run has come to its end already; there is nothing to do", output)
        return TrainerState.load_from_json(str(output / TRAINER_STATE_NAME)).log_history
    earlier.go_on_as(run)
    model = build_model(model_args, lora, backbone, config)
    features = None
    if data_args.cache_features:
        parts = [part for part in (data.train, data.test) if part is not None]
        features = cache_features(parts, model, backbone.processor, data_args.prepared_dir)
    drops = (clear.drop_all, clear.drop_source)
    collator = EditCollator(backbone.processor, model.vocabulary, *drops, seed=training.seed, features=features)
    if data.test is None:
        training.eval_strategy = "no"
    sigterm, speed, alarm = SaveOnSigterm(), Speed(), CollapseAlarm()
    trainer = build_trainer(PublishingTrainer, model, collator, data, clear, training, alarm, sigterm, speed)
    if clear.sample_edits and has_pictures(data.test) and not trainer.weights_are_sharded:
        rows = data.test.select(range(min(clear.sample_edits, len(data.test))))
        trainer.add_callback(SampleEdits(lambda: draw_samples(model, backbone.processor, rows)))
    recipe = effective_recipe(model_args, lora, data_args, clear, training, overrides)
    trainer.run_files = {RUN_FILE: run.to_json(), RECIPE_FILE: yaml.safe_dump(recipe, sort_keys=False)}
    if trainer.is_world_process_zero():
        if training.overwrite_output_dir:
            start_over(output)
        (output / RUN_FILE).unlink(missing_ok=True)  # it comes back at the end
    result = trainer.train(resume_from_checkpoint=earlier.checkpoint and str(earlier.checkpoint))
    if sigterm.stopped:
        logger.warning("SIGTERM: step %d is done and saved; the same command goes on", trainer.state.global_step)
        raise SystemExit(128 + signal.SIGTERM)
    if alarm.step is not None:
        raise ValueError(f"The loss collapsed at step {alarm.step}; nothing is saved or pushed beyond the checkpoints")
    _finish(trainer, data, data_args.calibration_edits > 0, result.metrics | speed.metrics(training))
    return trainer.state.log_history


def _finish(
    trainer: PublishingTrainer, data: PreparedData, wants_calibration: bool, metrics: dict[str, float]
) -> None:
    """Saves what was trained, calibrates, evaluates and pushes it; `RUN_FILE` says at last that all is there."""
    output = Path(trainer.args.output_dir)
    trainer.save_model(_internal_call=True)  # what is pushed is the end, with its metrics
    if trainer.is_world_process_zero():
        write_text(output / RECIPE_FILE, trainer.run_files[RECIPE_FILE])
    if wants_calibration:
        metrics |= calibrate_model(trainer, data.calibration)
    if data.test is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_card(output, trainer.args.hub_model_id)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        write_text(output / RUN_FILE, trainer.run_files[RUN_FILE])


def _fingerprints(config: ClearConfig, data: PreparedData, base_model: str) -> dict[str, str]:
    """What the options name, as it is now."""
    parts = {"training data": data.train, "held-out data": data.test}
    found = {name: data_fingerprint(rows) for name, rows in parts.items() if rows is not None}
    return {"base model": config.base_hash or base_model, "codebook": config.codebook_hash} | found


def has_pictures(rows: Dataset | None) -> bool:
    """Whether there are prepared records, with the source pictures beside their tokens."""
    return rows is not None and "source" in rows.column_names


def calibrate_model(trainer: ClearEditTrainer, rows: Dataset | None) -> dict[str, float]:
    """Calibrates what was trained and saved on records held out for that, in the first process; what came of it."""
    if trainer.weights_are_sharded or not has_pictures(rows):
        why = "its weights are sharded" if trainer.weights_are_sharded else "no held-out records with pictures"
        logger.warning("The gate stays uncalibrated: %s; `thinkclearly calibrate` does it later", why)
        return {}
    found = {}
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).eval()
        model.clear_config.clear_weight = trainer.clear_weight
        try:
            found = calibrate(Editor(model, trainer.processor), rows, trainer.args.per_device_eval_batch_size)
            write_clear_config(model.clear_config, trainer.args.output_dir)
        except (ValueError, torch.OutOfMemoryError) as error:  # nothing to fit; `thinkclearly calibrate` does it later
            logger.warning("The gate stays uncalibrated: %s", error)
    trainer.accelerator.wait_for_everyone()
    return found


def estimate_memory(
    model_args: ModelArguments, lora: LoraArguments, clear: ClearArguments, training: ClearTrainingArguments
) -> str:
    """A table of the memory that `train` will need on one device, without loading any weights."""
    janus = empty_janus(model_args.base_model, model_args.model_revision)
    dtype = getattr(torch, model_args.dtype)
    for part in (janus.model.language_model, janus.model.generation_head):  # what learns, and what its gradients cross
        part.to(dtype)
    config = ClearConfig(janus.config.vq_config.num_embeddings, clear_weight=clear.clear_weight)
    with torch.device("meta"):
        model = build_model(model_args, lora, Backbone(janus, None), config)
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    size = training.per_device_train_batch_size
    held = memory.weights(model, dtype, model_args.load_in_4bit)
    held += memory.learning(model, dtype, 1 if "8bit" in training.optim else None)
    used = memory.activations(model, size, autocast, training.activation_checkpointing)
    vq = sum(part.bytes for part in held if part.name == "vqmodel")
    sliced = (sum(part.bytes for part in held) - vq) / 8 + vq + sum(part.bytes for part in used)
    return (
        f"{model_args.base_model}: estimate for one device, {size} record(s) at a time, activation checkpointing "
        f"{'on' if training.activation_checkpointing else 'off'}\n\n{memory.table(held + used)}\n"
        f"With weights, gradients and states in slices over 8 devices (FSDP2, ZeRO 3): {sliced / memory.GIB:.2f} GiB "
        "each.\nNot counted: the CUDA context, buffers of communication, fragmentation, and evaluation.\n"
    )


def draw_samples(model, processor, rows: Dataset) -> Image.Image:
    """A sheet of source, raw, composite and mask for a few prepared rows, with the model as it is now."""
    was_training = model.training
    results = Editor(model, processor).edit_many(list(rows["source"]), list(rows["instruction"]))
    model.train(was_training)
    return sheet(
        [
            [
                (r.source, r.instruction),
                (r.raw, "raw"),
                (r.image, "composite"),
                (r.mask, f"{r.clear_fraction:.0%} CLEAR"),
            ]
            for r in results
        ]
    )


def judge_shapes(photos_folder: str | None = None):
    """A judge for the built-in shapes of "test": (key, picture) → whether the edit that the key names is done."""
    photos = tuple(sources.photos_of("test", photos_folder))

    def judge(key: str, picture: Image.Image) -> bool:
        seed, number = map(int, re.fullmatch(r"shapes\[(\d+):(\d+)\]", key).groups())
        return random_edit(seed, number, photos).is_done(picture)

    return judge


def evaluate_rows(editor: Editor, rows: Dataset, data: DataArguments, batch_size: int) -> Evaluation:
    """Edits held-out pairs and measures; see `evaluation.edits`."""
    return evaluate_edits(
        editor,
        (sources.read_example(row) for row in rows),
        judge=judge_shapes(data.photos_folder) if data.source == "shapes" else None,
        pixel_tolerance=data.pixel_tolerance,
        batch_size=batch_size,
        total=len(rows),
    )


def machine() -> str:
    """The machine in words, for reports."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
