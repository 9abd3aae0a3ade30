"""`thinkclearly JOB [recipe.yaml] --key value …`: a table of jobs. Imports a job's module only to run it."""

from __future__ import annotations

import logging
import sys
from importlib import import_module

from thinkclearly import __version__

logger = logging.getLogger("thinkclearly")

# Where the job's `main(argv)` is, and what it does.
JOBS = {
    "prepare": ("commands.prepare", "Tokenize and label photo pairs; statistics, plots and a look at examples."),
    "train": ("commands.train", "Fine-tune with CLEAR: prepare, train or go on training, evaluate, save."),
    "calibrate": ("commands.calibrate", "Fit a fine-tune's gate to held-out records; train does it by itself."),
    "edit": ("commands.edit", "Edit a picture, or folders and data sets of them, by instructions."),
    "generate": ("commands.generate", "Draw pictures from words."),
    "describe": ("commands.describe", "Answer a question about a picture."),
    "think": ("commands.think", "Think in words and pictures: draw, say what is wrong, draw again."),
    "evaluate": ("commands.evaluate", "Measure a folder of saved edits, or run a benchmark."),
    "convert": ("commands.convert", "Rewrite a checkpoint in DeepSeek's layout or in transformers'."),
    "push": ("commands.push", "Upload a fine-tune or prepared data to the Hub."),
    "bench": ("bench.run", "Time the decoder against the reference loop and transformers' own."),
    "demo": ("demo", "Everything at once on the tiny model: data, fine-tune, edits, report."),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `thinkclearly` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        sys.stdout.write(f"thinkclearly {__version__}\n")
    elif argv and argv[0] in JOBS:
        start(argv[0], argv[1:])
    else:
        asked = argv[:1] in (["-h"], ["--help"])
        out = sys.stdout if asked else sys.stderr
        out.write("usage: thinkclearly JOB [recipe.yaml] [--key value …]\n\n")
        out.writelines(f"  {name:10} {line}\n" for name, (_, line) in JOBS.items())
        out.write("\nthinkclearly JOB --help lists a job's options.\n")
        if argv and not asked:
            out.write(f"\nthinkclearly: error: unknown job {argv[0]!r}\n")
        raise SystemExit(0 if asked else 2)


def start(job: str, argv: list[str] | None = None) -> None:
    """Runs a job with logging set up; what a user can mend is a message and exit status 1, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "httpx2", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        if not {"-h", "--help", "--help_all"} & set(argv):
            _join_processes()
        import_module(f"thinkclearly.{JOBS[job][0]}").main(argv)
    except (OSError, ValueError, ImportError) as error:  # ImportError: an optional package, as bitsandbytes
        logger.debug("", exc_info=True)
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(1) from error


def _join_processes() -> None:
    import atexit

    import torch
    from accelerate import PartialState

    # On the CPU, processes form a group only with `cpu=True`.
    state = PartialState(cpu=not torch.accelerator.is_available())
    # The group's threads would now and then abort the process that they outlive.
    atexit.register(state.destroy_process_group)
