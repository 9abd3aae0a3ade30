"""Trains one variant with one seed; a folder that is there already is left alone."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from benchmarks.stability.variants import VARIANTS
from thinkclearly.data.splits import build_data
from thinkclearly.files import write_json
from thinkclearly.models.instruction_head import CONFIG_FILE
from thinkclearly.sequence import Dropout
from thinkclearly.training.callbacks import EpochOfDropout, TuneClearWeight
from thinkclearly.training.methods import parse_options
from thinkclearly.training.setup import build_checkpoint, build_model, new_config

RECIPE = "recipes/tiny.yaml"


def gates(output: Path, name: str, seed: int, settings: dict) -> Path:
    """Where the grids of a point's edits are kept."""
    words = [name, str(seed), *(f"{key}={value}" for key, value in sorted(settings.items()))]
    return output / "gates" / ("-".join(words).replace(" ", "-") + ".npz")


def folder(output: Path, variant: str, seed: int) -> Path:
    return output / "models" / f"{variant.replace(' ', '-')}-seed{seed}"


def recipe(output: Path, **overrides):
    """The demo's recipe and its method; bfloat16 and eager attention are what trains fastest on a CPU."""
    overrides = {
        "limit": 4800,
        "bf16": True,
        "attn_implementation": "eager",
        "prepared_dir": output / "prepared",
    } | overrides
    flags = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    return parse_options([RECIPE, *flags], "stability")


def train(output: Path, variant: str, seed: int) -> None:
    """Trains and saves one model; the data, and with it the held-out edits, are the same for every seed."""
    directory = folder(output, variant, seed)
    if (directory / CONFIG_FILE).is_file():
        return
    how = VARIANTS[variant]
    overrides = {"output_dir": directory, "seed": seed, "save_strategy": "no", "sample_edits": 0} | how.overrides
    options, _ = recipe(output, **overrides)
    set_seed(seed)
    clear, checkpoint = options.method, build_checkpoint(options.model)
    data = build_data(options.data, checkpoint)
    config = new_config(checkpoint, options.settings, clear.instructions, clear.clear_weight)
    model = build_model(options, checkpoint, config)
    dropout = Dropout(clear.drop_all, clear.drop_source, seed)
    collator = how.collator(checkpoint.processor, model.vocabulary, dropout)
    trainer = how.trainer(
        model=model,
        processor=checkpoint.processor,
        clear_weight=clear.clear_weight,
        clear_head_lr=clear.clear_head_lr,
        data_collator=collator,
        args=options.training,
        train_dataset=data.train,
        eval_dataset=data.test,
        callbacks=[EpochOfDropout(collator)],
    )
    if clear.tune_clear_weight:
        trainer.add_callback(TuneClearWeight(trainer))
    trainer.train()
    write_json(directory / "log.json", trainer.state.log_history)
    trainer.save_model()
