"""Trains one variant with one seed; a folder that is there already is left alone."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from benchmarks.stability.variants import VARIANTS
from thinkclearly import jobs
from thinkclearly.data.splits import build_data
from thinkclearly.files import write_json
from thinkclearly.models.instruction_head import CONFIG_FILE
from thinkclearly.recipe import RecipeParser

RECIPE = "recipes/tiny.yaml"


def folder(output: Path, variant: str, seed: int) -> Path:
    return output / "models" / f"{variant.replace(' ', '-')}-seed{seed}"


def recipe(output: Path, **overrides):
    """The parsed options of the demo's recipe; bfloat16 and eager attention are what trains fastest on a CPU."""
    overrides = {
        "limit": 4800,
        "bf16": True,
        "attn_implementation": "eager",
        "prepared_dir": output / "prepared",
    } | overrides
    flags = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    return RecipeParser(jobs.TRAIN_OPTIONS, prog="stability").parse([RECIPE, *flags])


def train(output: Path, variant: str, seed: int) -> None:
    """Trains and saves one model; the data, and with it the held-out edits, are the same for every seed."""
    directory = folder(output, variant, seed)
    if (directory / CONFIG_FILE).is_file():
        return
    how = VARIANTS[variant]
    options = {"output_dir": directory, "seed": seed, "save_strategy": "no", "sample_edits": 0} | how.overrides
    model_args, lora, data_args, clear, training, overrides = recipe(output, **options)
    set_seed(seed)
    checkpoint = jobs.build_backbone(model_args)
    data = build_data(data_args, checkpoint)
    config = jobs.new_config(checkpoint, clear, overrides)
    model = jobs.build_model(model_args, lora, checkpoint, config)
    collator = how.collator(checkpoint.processor, model.vocabulary, clear.drop_all, clear.drop_source, seed=seed)
    trainer = jobs.build_trainer(how.trainer, model, collator, data, clear, training)
    trainer.train()
    write_json(directory / "log.json", trainer.state.log_history)
    trainer.save_model()
