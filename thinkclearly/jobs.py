"""The jobs behind the command line: each takes parsed options and puts the rooms together.

Knows every room but the command line itself.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import signal
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from transformers import BitsAndBytesConfig, set_seed

from thinkclearly.config import (
    ClearArguments,
    ClearTrainingArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    effective_recipe,
    is_local,
    option,
)
from thinkclearly.data import sources
from thinkclearly.data.collator import EditCollator
from thinkclearly.data.jsonl import read_jsonl
from thinkclearly.data.prepare import label_dataset, load_encoded, prepare_dataset
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.editing.editor import Editor, EditSettings
from thinkclearly.evaluation.calibration import calibrate
from thinkclearly.evaluation.edits import Evaluation, evaluate_edits
from thinkclearly.evaluation.pictures import sheet
from thinkclearly.hub.card import RECIPE_FILE
from thinkclearly.hub.publish import pull_dataset
from thinkclearly.hub.trainer import PublishingTrainer
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.backbone import Backbone, base_hash, codebook_hash, load_backbone
from thinkclearly.models.clear_head import ClearConfig, ClearEditModel, write_clear_config
from thinkclearly.models.empty import empty_janus
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
from thinkclearly.training.checkpoints import is_whole, last_checkpoint
from thinkclearly.training.trainer import ClearEditTrainer

logger = logging.getLogger(__name__)

# The fields of EditSettings as options that are None where not given: a checkpoint brings defaults of its own.
SettingOverrides = make_dataclass(
    "SettingOverrides",
    [
        (
            f.name,
            {"str": str, "float": float, "int": int, "bool": bool}[f.type] | None,
            option(None, f.metadata["help"]),
        )
        for f in fields(EditSettings)
    ],
)

# What a training recipe may hold, in the order of `train`'s parameters.
TRAIN_OPTIONS = (
    ModelArguments,
    LoraArguments,
    DataArguments,
    ClearArguments,
    ClearTrainingArguments,
    SettingOverrides,
)


def given(overrides) -> dict:
    """The settings that were given on the command line or in the recipe."""
    return {name: value for name, value in vars(overrides).items() if value is not None}


@dataclass
class PreparedData:
    """Tokenized splits, and the held-out pictures they came from where there are any."""

    train: Dataset
    test: Dataset | None
    test_rows: Dataset | None


def read_rows(data: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Photo pairs for training and evaluation, from the source that the options name."""
    if data.source == "shapes":
        options = {"size": data.shapes_size, "seed": data.split_seed, "photos_folder": data.photos_folder}
        train = sources.shapes(data.limit or 2000, **options)
        return train, sources.shapes(data.eval_samples, split="test", **options) if data.eval_samples else None
    if data.source == "magicbrush":
        rows = sources.magicbrush(
            data.path or "osunlp/MagicBrush",
            split=data.split,
            include=data.include,
            exclude=data.exclude,
            match=data.match,
            turn_index=data.turn_index,
            shuffle_seed=data.split_seed if data.shuffle else None,
            limit=data.limit,
            streaming=data.streaming,
        )
        if data.streaming:
            rows = Dataset.from_list(list(rows), features=sources.FEATURES)
    else:
        rows = sources.folder(data.path) if data.source == "folder" else sources.sharegpt4o(data.path)
        rows = limit_rows(rows, data)
    return split_rows(rows, data)


def limit_rows(rows: Dataset, data: DataArguments) -> Dataset:
    """The first `limit` records, shuffled before where that is asked for."""
    rows = rows.shuffle(seed=data.split_seed) if data.shuffle else rows
    return rows.select(range(min(data.limit, len(rows)))) if data.limit else rows


def split_rows(rows: Dataset, data: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Holds `eval_samples` records out."""
    if not data.eval_samples:
        return rows, None
    if data.eval_samples >= len(rows):
        raise ValueError(
            f"eval_samples={data.eval_samples} of {len(rows)} records leaves none to train on; lower it or add data"
        )
    parts = rows.train_test_split(test_size=data.eval_samples, seed=data.split_seed)
    return parts["train"], parts["test"]


def build_data(data: DataArguments, backbone: Backbone) -> PreparedData:
    """Reads, tokenizes and labels; what was prepared before is found again."""
    if data.source == "jsonl":
        codes, tokens = backbone.model.config.vq_config.num_embeddings, backbone.processor.num_image_tokens
        rows, _ = read_jsonl(data.path, codes, tokens, on_bad_record=data.on_bad_record)
        rows = rows.add_column("key", [f"{data.path}[{i}]" for i in range(len(rows))])
        train, test = split_rows(rows, data)
        return PreparedData(train, test, None)
    state = PartialState()
    if data.source == "prepared":
        with state.main_process_first():
            encoded = limit_rows(load_encoded(pull_dataset(data.path), backbone), data)
            vocabulary = InstructionVocabulary(backbone.model.config.vq_config.num_embeddings)
            rows = label_dataset(encoded, data.clear_label, data.pixel_tolerance, vocabulary)
        return PreparedData(*split_rows(rows, data), None)
    with state.main_process_first():
        train_rows, test_rows = read_rows(data)
    options = {
        "clear_label": data.clear_label,
        "pixel_tolerance": data.pixel_tolerance,
        "batch_size": data.prepare_batch_size,
        "on_bad_record": data.on_bad_record,
    }
    backbone.model.model.vqmodel.to(state.device)
    train = prepare_dataset(train_rows, backbone, data.prepared_dir, **options)
    test = None if test_rows is None else prepare_dataset(test_rows, backbone, data.prepared_dir, **options)
    return PreparedData(train, test, test_rows)


def build_backbone(model: ModelArguments) -> Backbone:
    """The base model of a training run, on this process's device."""
    dtype = getattr(torch, model.dtype)
    quantization = None
    if model.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["vqmodel", "vision_model", "aligner", "generation_head", "lm_head"],
        )
    return load_backbone(
        model.base_model,
        revision=model.model_revision,
        dtype=dtype,
        device=PartialState().device,
        attn_implementation=model.attn_implementation,
        quantization_config=quantization,
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


def train(
    model_args: ModelArguments,
    lora: LoraArguments,
    data_args: DataArguments,
    clear: ClearArguments,
    training: ClearTrainingArguments,
    overrides,
) -> ClearEditTrainer:
    """Prepares what is not prepared, trains (going on from the last checkpoint), evaluates and saves."""
    if training.push_to_hub and lora.lora_r and is_local(model_args.base_model):
        raise ValueError(
            f"push_to_hub: nobody else can load the adapter's base {model_args.base_model}. Give a Hub id as "
            "base_model, or leave push_to_hub out and then use `thinkclearly push DIR --base_model_id owner/name`."
        )
    set_seed(training.seed)
    backbone = build_backbone(model_args)
    data = build_data(data_args, backbone)
    config = new_config(backbone, clear, overrides)
    model = build_model(model_args, lora, backbone, config)
    collator = EditCollator(
        backbone.processor, model.vocabulary, clear.drop_all, clear.drop_source, seed=training.seed
    )
    if data.test is None:
        training.eval_strategy = "no"
    sigterm, speed, alarm = SaveOnSigterm(), Speed(), CollapseAlarm()
    trainer = PublishingTrainer(
        model=model,
        processor=backbone.processor,
        clear_weight=clear.clear_weight,
        clear_head_lr=clear.clear_head_lr,
        data_collator=collator,
        args=training,
        train_dataset=data.train,
        eval_dataset=data.test,
        callbacks=[EpochOfDropout(collator), alarm, sigterm, speed],
    )
    if clear.tune_clear_weight:
        trainer.add_callback(TuneClearWeight(trainer))
    # Editing reaches into the model outside its forward pass, where FSDP has the weights in slices.
    if clear.sample_edits and data.test_rows is not None and not trainer.is_fsdp_enabled:
        rows = data.test_rows.select(range(min(clear.sample_edits, len(data.test_rows))))
        trainer.add_callback(SampleEdits(lambda: draw_samples(model, backbone.processor, rows)))
    last = training.resume_from_checkpoint or last_checkpoint(training.output_dir)
    if last is not None:
        if not is_whole(last):
            raise ValueError(
                f"{last} is no checkpoint or was not written to its end; without resume_from_checkpoint the run goes "
                "on from the last whole one."
            )
        logger.info("Going on from %s", last)
    if trainer.is_world_process_zero():
        recipe = effective_recipe(model_args, lora, data_args, clear, training, overrides)
        write_text(Path(training.output_dir) / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False))
    result = trainer.train(resume_from_checkpoint=last and str(last))
    if sigterm.stopped:
        logger.warning("SIGTERM: step %d is done and saved; the same command goes on", trainer.state.global_step)
        raise SystemExit(128 + signal.SIGTERM)
    if alarm.step is not None:
        raise ValueError(f"The loss collapsed at step {alarm.step}; nothing is saved or pushed beyond the checkpoints")
    trainer.save_model(_internal_call=True)  # what is pushed is the end, with its metrics
    trainer.save_state()
    metrics = result.metrics | speed.metrics(training) | calibrate_model(trainer, data.test, clear.calibration_edits)
    if data.test is not None:
        metrics.update(trainer.evaluate())
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    if training.push_to_hub:
        trainer.push_to_hub()
    return trainer


def calibrate_model(trainer: ClearEditTrainer, rows: Dataset | None, count: int) -> dict[str, float]:
    """Calibrates what was trained and saved on `count` held-out records, in the first process; what came of it."""
    sliced = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # no process has the weights for itself
    if not count or rows is None or "source" not in rows.column_names or sliced:
        logger.info("The gate stays uncalibrated: that takes held-out records with pictures, no FSDP, no DeepSpeed")
        return {}
    found = {}
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).eval()
        model.clear_config.clear_weight = trainer.clear_weight
        chosen = rows.select(range(min(count, len(rows))))
        try:
            found = calibrate(Editor(model, trainer.processor), chosen, trainer.args.per_device_eval_batch_size)
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
    """A sheet of source, raw, composite and mask for a few rows, with the model as it is now."""
    was_training = model.training
    examples = [sources.read_example(row) for row in rows]
    results = Editor(model, processor).edit_many([e.source for e in examples], [e.instruction for e in examples])
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
    """A judge for the built-in shapes: (key, picture) → whether the edit that the key names is done."""
    photos = sources.pictures_in(photos_folder) if photos_folder else packaged_photos("test")

    def judge(key: str, picture: Image.Image) -> bool:
        seed, number = map(int, re.fullmatch(r"shapes\[(\d+):(\d+)\]", key).groups())
        return random_edit(seed, number, tuple(photos)).is_done(picture)

    return judge


def evaluate_rows(editor: Editor, rows: Dataset, data: DataArguments, batch_size: int, keep: int = 24) -> Evaluation:
    """Edits held-out pairs and measures; see `evaluation.edits`."""
    return evaluate_edits(
        editor,
        (sources.read_example(row) for row in rows),
        judge=judge_shapes(data.photos_folder) if data.source == "shapes" else None,
        pixel_tolerance=data.pixel_tolerance,
        batch_size=batch_size,
        keep=keep,
        total=len(rows),
    )


def machine() -> str:
    """The machine in words, for reports."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is never seen half done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
