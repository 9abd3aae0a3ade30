"""Fine-tune with CLEAR: prepare, train (going on from the last checkpoint), evaluate, save."""

from __future__ import annotations

import sys

from thinkclearly import jobs
from thinkclearly.recipe import RecipeParser


def main(argv: list[str] | None = None) -> None:
    options = RecipeParser(jobs.TRAIN_OPTIONS, prog="thinkclearly train", description=__doc__).parse(argv)
    model, lora, _, clear, training, _ = options
    if training.dry_run:
        sys.stdout.write(jobs.estimate_memory(model, lora, clear, training))
    else:
        jobs.train(*options)
