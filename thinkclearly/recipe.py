"""The recipe parser: YAML as argparse defaults, then --key value on top. Knows options, and nothing of the jobs.

Imports neither torch nor the rooms: a job's `--help` waits for no model.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import textwrap
from argparse import ArgumentTypeError
from dataclasses import field
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

DTYPES = ("float32", "bfloat16", "float16")
# In a shared recipe: a value that has to be given.
LEFT_OUT = "<a path on the machine that trained>"

# Options that name code to run. Recipes come from others, so these are given on the command line.
CODE = ("own_rewards",)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose from {', '.join(choices)}")


def option(default, text: str):
    """A dataclass field with its help line."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


class RecipeParser(HfArgumentParser):
    """Command lines of the form `[recipe.yaml] --key value …` into dataclasses.

    The recipe's values become argparse defaults, so they are cast like flags and flags override them. A key that no
    dataclass has is an error that names the nearest one; so is a value of another kind than the field's.

    Args:
        skipped: dataclasses of another job, whose keys a recipe may hold and this job does not use.
    """

    def __init__(self, *args, skipped: tuple[type, ...] = (), **kwargs):
        # No abbreviations: `--lora` for `--lora_r` would hide a slip.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.skipped = {name for kind in skipped for name in _init_names(kind)} - set(self._names())
        self.hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        self.usage = self.usage or f"{self.prog} [recipe.yaml] [--key value …]"

    def parse(self, argv: list[str] | None = None) -> tuple:
        argv = list(sys.argv[1:] if argv is None else argv)
        if "--help_all" in argv:
            sys.stdout.write(self.format_help(theirs=True))
            self.exit()
        recipe = argv.pop(0) if argv and argv[0].endswith((".yaml", ".yml")) else None
        if recipe is not None:
            self.set_defaults(**self._read(recipe))
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown
            self.error("; ".join(self._suggest(flag.lstrip("-"), f"unknown option {flag}") for flag in flags))
        try:
            return tuple(
                kind(**{name: getattr(namespace, name) for name in _init_names(kind)}) for kind in self.dataclass_types
            )
        except Exception as error:  # TrainingArguments raises what its many parts raise
            self.error(f"{error or type(error).__name__}")

    def format_help(self, theirs: bool = False) -> str:
        """A line for each of our options, by dataclass; of transformers' own too if asked for `theirs`."""
        lines, hidden = [f"usage: {self.usage}", "", self.description or ""], 0
        for owner, names in self._by_owner().items():
            if _is_theirs(owner):
                if not theirs:
                    hidden += len(names)
                    continue
                lines += ["", f"transformers' {owner.__name__}; its documentation says more:"]
            else:
                lines += ["", inspect.getdoc(owner).splitlines()[0].rstrip(".") + ":"]
            lines += [self._help_line(name, _is_theirs(owner)) for name in names]
        if hidden:
            lines += ["", f"--help_all lists {hidden} options of transformers' own, too."]
        return "\n".join(lines) + "\n"

    def _by_owner(self) -> dict[type, list[str]]:
        """The options that each dataclass declares: what a job adds before what it inherits, ours before theirs."""
        owners = {}
        for kind in self.dataclass_types:
            left = _init_names(kind)
            for owner in kind.__mro__:
                own = [name for name in left if name in vars(owner).get("__annotations__", {})]
                left = [name for name in left if name not in own]
                if own:
                    owners[owner] = own
        return {owner: owners[owner] for owner in sorted(owners, key=_is_theirs)}

    def _help_line(self, name: str, shortened: bool) -> str:
        action = next(action for action in self._actions if action.dest == name)
        text = " ".join((action.help or "").replace("%%", "%").split())
        if shortened:
            text = textwrap.shorten(text, 110, placeholder=" …")
        default = "required" if action.required else _written(action.default)
        return f"  --{name:<27} {text}" + (f" ({default})" if default else "")

    def error(self, message: str):
        """The message alone: the usage of a few hundred options would push it off the screen."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _read(self, recipe: str) -> dict:
        try:
            content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"cannot read the recipe {recipe}: {error.strerror}")
        except Exception as error:  # besides YAMLError PyYAML lets ValueError, KeyError, RecursionError, … through
            self.error(f"{recipe} is not valid YAML: {error}")
        if not isinstance(content, dict):
            self.error(f"{recipe}: expected `key: value` lines, found {type(content).__name__}")
        content = {key: value for key, value in content.items() if key not in self.skipped}
        for key in content:
            if key not in self._names():
                self.error(self._suggest(str(key), f"{recipe}: unknown key {key!r}"))
        for key in CODE:
            if content.get(key, LEFT_OUT) != LEFT_OUT:
                self.error(f"{recipe}: {key} names code to run, so a recipe cannot hold it; give it as --{key} …")
        left_out = {key for key, value in content.items() if value == LEFT_OUT}
        content = {key: value for key, value in content.items() if key not in left_out}
        for action in self._actions:
            action.required = action.dest in left_out or action.required and action.dest not in content
            if action.dest in content:
                content[action.dest] = self._value(action, content[action.dest], f"{recipe}: {action.dest}")
        return content

    def _value(self, action, value, where: str):
        """A YAML value as the default that argparse casts (a string) or keeps (everything else)."""
        hint = self.hints[action.dest]
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = {get_origin(kind) or kind for kind in kinds}
        if type(value) in kinds & {bool, dict, NoneType}:
            return value
        if isinstance(value, bool) and bool not in kinds:
            self.error(f"{where} is {value}; expected a word or number. YAML reads yes, no, on and off so: quote them")
        if list in kinds and (isinstance(value, list) or action.nargs == "+"):
            values = value if isinstance(value, list) else [value]
            if not all(type(item) in (str, int, float) for item in values):
                self.error(f"{where} is {value!r}; expected a list of words or numbers")
            return [self._cast(action, str(item), where) for item in values]
        if not isinstance(value, (str, int, float, date)):
            self.error(f"{where} is {value!r}; expected one value" if value is not None else f"{where} has no value")
        return self._cast(action, str(value), where)

    def _cast(self, action, text: str, where: str):
        try:
            value = text if action.type is None else action.type(text)
        except (ValueError, ArgumentTypeError):
            self.error(f"{where} is {text!r}; expected {getattr(action.type, '__name__', action.type)}")
        if action.choices is not None and value not in action.choices:
            self.error(f"{where} is {text!r}; choose from {', '.join(map(str, action.choices))}")
        return value

    def _names(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help"]

    def _suggest(self, name: str, message: str) -> str:
        near = difflib.get_close_matches(name.replace("-", "_"), self._names(), n=1)
        return message + (f"; did you mean {near[0]!r}?" if near else "; see --help for the valid names")


def _written(default) -> str:
    """A default as a command line has it; nothing where the option's text says what happens."""
    if default is None or default in ([], {}):
        return ""
    if isinstance(default, (list, tuple)):
        return f"default: {' '.join(map(str, default))}"
    value = getattr(default, "value", default)
    return f"default: {str(value).lower() if isinstance(value, bool) else value}"


def _is_theirs(owner: type) -> bool:
    return owner.__module__.startswith("transformers.")


def _init_names(kind) -> list[str]:
    return [name for name, f in kind.__dataclass_fields__.items() if f.init]
