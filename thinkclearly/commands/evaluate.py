"""Measure saved edits, `thinkclearly evaluate DIR`, or run a benchmark, `evaluate --benchmark magicbrush …`.

Benchmarks of edits: magicbrush, pie-bench. Of drawing, with options of their own: paircomp, geneval,
shapes-pairs; with --mode critique or another of `thinkclearly think` they compare a thought's first and last picture.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from thinkclearly.commands.loading import LoadArguments, load_any, load_finetune, weights
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.editing.settings import SettingOverrides, given
from thinkclearly.recipe import RecipeParser, option

USAGE = (
    "thinkclearly evaluate DIR\n       thinkclearly evaluate [recipe.yaml] --benchmark NAME [--help] [--key value …]"
)


@dataclass
class EvaluateArguments(LoadArguments):
    """The fine-tune that is measured."""

    model: str = option("outputs/clear", "Folder or Hub id of the fine-tune.")


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word.split("=")[0] == "--benchmark" for word in argv) or argv[:1] and _is_recipe(argv[0]):
        return _benchmark(argv)
    from thinkclearly.evaluation.folder import evaluate_folder

    if len(argv) != 1 or argv[0].startswith("-"):
        sys.stdout.write(f"usage: {USAGE}\n\n{__doc__}\n{inspect.getdoc(evaluate_folder)}\n")
        raise SystemExit(0 if argv in (["-h"], ["--help"]) else 2)
    evaluate_folder(argv[0])


def _benchmark(argv: list[str]) -> None:
    from thinkclearly.evaluation.benchmarks.drawn import NUM_IMAGES, DrawnArguments, run_drawn
    from thinkclearly.evaluation.benchmarks.run import BenchmarkArguments, run_benchmark

    drawn = _named(argv, "benchmark") in NUM_IMAGES
    thinks = drawn and _named(argv, "mode") is not None
    options = [DrawnArguments, LoadArguments] if drawn else [BenchmarkArguments, EvaluateArguments]
    options.append(ThoughtSettings if thinks else SettingOverrides)
    parser = RecipeParser(options, usage=USAGE, prog="thinkclearly evaluate", description=__doc__)
    arguments, model, settings = parser.parse(argv)
    if drawn:
        named = weights(model) | {"model": model.model or "tiny"}
        run_drawn(load_any(model), arguments, named, settings if thinks else given(settings))
    else:
        run_benchmark(load_finetune(model), arguments, weights(model), given(settings))


def _is_recipe(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _named(argv: list[str], option: str) -> str | None:
    """What the command line or its recipe says of an option. What is wrong with either, the parser tells."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(f"--{option}", dest="value", nargs="?")
    value = finder.parse_known_args(argv)[0].value
    if value is None and _is_recipe(argv[0]):
        try:
            recipe = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
        value = recipe.get(option) if isinstance(recipe, dict) else None
    return value
