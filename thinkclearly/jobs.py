"""The jobs behind the command line: each takes parsed options and puts the rooms together.

Knows every room but the command line itself.
"""

from __future__ import annotations

import json
import logging
import platform
import re
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from transformers import BitsAndBytesConfig, set_seed
from transformers.trainer_utils import get_last_checkpoint

from thinkclearly.config import (
    ClearArguments,
    ClearTrainingArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    option,
)
from thinkclearly.data import sources
from thinkclearly.data.collator import EditCollator
from thinkclearly.data.jsonl import read_jsonl
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.editing.editor import Editor, EditSettings
from thinkclearly.evaluation.edits import Evaluation, evaluate_edits
from thinkclearly.evaluation.pictures import sheet
from thinkclearly.models.backbone import Backbone, codebook_hash, load_backbone
from thinkclearly.models.clear_head import ClearConfig
from thinkclearly.training.adapters import add_lora
from thinkclearly.training.callbacks import CollapseAlarm, EpochOfDropout, SampleEdits, TuneClearWeight
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
        rows = rows.shuffle(seed=data.split_seed) if data.shuffle else rows
        rows = rows.select(range(min(data.limit, len(rows)))) if data.limit else rows
    return split_rows(rows, data)


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


def train(
    model_args: ModelArguments,
    lora: LoraArguments,
    data_args: DataArguments,
    clear: ClearArguments,
    training: ClearTrainingArguments,
    overrides,
) -> ClearEditTrainer:
    """Prepares what is not prepared, trains (going on from the last checkpoint), evaluates and saves."""
    set_seed(training.seed)
    backbone = build_backbone(model_args)
    data = build_data(data_args, backbone)
    config = ClearConfig(
        codebook_size=backbone.model.config.vq_config.num_embeddings,
        clear_weight=clear.clear_weight,
        codebook_hash=codebook_hash(backbone.model),
        edit=given(overrides),
    )
    model = add_lora(
        backbone,
        model_args.base_model,
        config,
        revision=model_args.model_revision,
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )
    collator = EditCollator(
        backbone.processor, model.vocabulary, clear.drop_all, clear.drop_source, seed=training.seed
    )
    if data.test is None:
        training.eval_strategy = "no"
    trainer = ClearEditTrainer(
        model=model,
        processor=backbone.processor,
        clear_weight=clear.clear_weight,
        clear_head_lr=clear.clear_head_lr,
        data_collator=collator,
        args=training,
        train_dataset=data.train,
        eval_dataset=data.test,
        callbacks=[EpochOfDropout(collator), CollapseAlarm()],
    )
    if clear.tune_clear_weight:
        trainer.add_callback(TuneClearWeight(trainer))
    if clear.sample_edits and data.test_rows is not None:
        rows = data.test_rows.select(range(min(clear.sample_edits, len(data.test_rows))))
        trainer.add_callback(SampleEdits(lambda: draw_samples(model, backbone.processor, rows)))
    last = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if last is not None:
        logger.info("Going on from %s", last)
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or last)
    trainer.save_model()
    trainer.save_state()
    metrics = dict(result.metrics)
    if data.test is not None:
        metrics.update(trainer.evaluate())
    trainer.save_metrics("all", metrics)
    return trainer


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
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
