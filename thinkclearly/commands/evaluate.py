"""Measure saved edits, `thinkclearly evaluate DIR`, or run a benchmark, `evaluate --benchmark magicbrush …`."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

from thinkclearly.commands.loading import LoadArguments, load_finetune, weights
from thinkclearly.editing.settings import SettingOverrides, given
from thinkclearly.recipe import RecipeParser, option

USAGE = "thinkclearly evaluate DIR\n       thinkclearly evaluate --benchmark NAME [--help] [--key value …]"


@dataclass
class EvaluateArguments(LoadArguments):
    """The fine-tune that is measured."""

    model: str = option("outputs/clear", "Folder or Hub id of the fine-tune.")


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word.split("=")[0] == "--benchmark" for word in argv) or argv[:1] and argv[0].endswith((".yaml", ".yml")):
        return _benchmark(argv)
    from thinkclearly.evaluation.folder import evaluate_folder

    if len(argv) != 1 or argv[0].startswith("-"):
        sys.stdout.write("usage: " + USAGE + "\n\n" + inspect.getdoc(evaluate_folder) + "\n")
        raise SystemExit(0 if argv in (["-h"], ["--help"]) else 2)
    evaluate_folder(argv[0])


def _benchmark(argv: list[str]) -> None:
    from thinkclearly.evaluation.benchmarks.run import BenchmarkArguments, run_benchmark

    options = [BenchmarkArguments, EvaluateArguments, SettingOverrides]
    parser = RecipeParser(options, usage=USAGE, prog="thinkclearly evaluate", description=__doc__)
    arguments, model, overrides = parser.parse(argv)
    run_benchmark(load_finetune(model), arguments, weights(model), given(overrides))
