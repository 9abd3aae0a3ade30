"""The methods of training by name, and a command line or recipe as the options of a run.

A method is a module: `Arguments` (its options), `Trainer`, `instructions`, `read_data`, `build` and `finish`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import yaml

from thinkclearly.data.options import DataArguments
from thinkclearly.editing.settings import SettingOverrides, given
from thinkclearly.recipe import RecipeParser, check_choice
from thinkclearly.training.options import LoraArguments, ModelArguments, Options, RunArguments

METHODS = {
    "clear": "Instruction tokens: labels over K + I classes, so that unchanged patches are copied.",
    "sft": "Supervised: pictures from words, edits and answers, as Janus-4o was trained.",
    "interleaved": "Thoughts: words and pictures that alternate in one stream, as TwGI was trained.",
    "distill": "Guidance distillation: one row learns what guided rows draw, for drawing and for edits.",
    "grpo": "Rewards: samples compared in groups, as FocusDiff was trained; for drawing and for edits.",
}


def load_method(name: str) -> ModuleType:
    """The module of a method."""
    check_choice("method", name, tuple(METHODS))
    return import_module(f"thinkclearly.training.{name}")


def option_classes(method: ModuleType) -> list[type]:
    """Every group of options that a recipe of this method may hold."""
    return [ModelArguments, LoraArguments, DataArguments, method.Arguments, RunArguments, SettingOverrides]


def all_option_classes() -> tuple[type, ...]:
    """The groups of all methods: what other jobs leave unread in a training recipe."""
    kinds = [kind for name in METHODS for kind in option_classes(load_method(name))]
    return tuple(dict.fromkeys(kinds))


def parse_options(argv: list[str] | None, prog: str, description: str | None = None, also: tuple[type, ...] = ()):
    """`[recipe.yaml] --key value …` as the options of a run.

    Args:
        also: further dataclasses of the job.

    Returns:
        `Options`, the method's module, and an instance of each class of `also`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        method = load_method(_named_method(argv))
    except ValueError as error:
        sys.stderr.write(f"{prog}: error: {error}\n")
        raise SystemExit(2) from error
    parser = RecipeParser([*option_classes(method), *also], prog=prog, description=description)
    model, lora, data, own, training, settings, *others = parser.parse(argv)
    return Options(model, lora, data, own, training, given(settings)), method, *others


def _named_method(argv: list[str]) -> str:
    """The method of a command line, before anything else of it is read: it decides which options there are."""
    for word, value in reversed([*zip(argv, [*argv[1:], None])]):  # the last one counts, as argparse has it
        if word.startswith("--method="):
            return word.partition("=")[2]
        if word == "--method" and value is not None:
            return value
    if argv and argv[0].endswith((".yaml", ".yml")):
        try:
            recipe = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
        except Exception:  # the parser says what is wrong with it
            return RunArguments.method
        if isinstance(recipe, dict) and "method" in recipe:
            return str(recipe["method"])
    return RunArguments.method
