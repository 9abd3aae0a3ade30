"""The model that a job's options name, and what the jobs that load one share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from thinkclearly.recipe import DTYPES, check_choice, option

if TYPE_CHECKING:
    from thinkclearly.editing.editor import Editor

logger = logging.getLogger(__name__)


@dataclass
class LoadArguments:
    """The model."""

    model: str | None = option(None, "Folder or Hub id, or with --base a state dict; not given: the tiny model.")
    base: str | None = option(None, "Base model: of a state dict, or instead of the one that the fine-tune names.")
    dtype: str = option("float32", "float32, bfloat16 or float16.")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps; the best there is if not given.")
    load_in_8bit: bool = option(False, "The language model in 8 bits (bitsandbytes): half the memory of bfloat16.")
    load_in_4bit: bool = option(False, "The language model in 4 bits (bitsandbytes, NF4): a quarter.")
    compile: bool = option(False, "torch.compile the language model: minutes at first, for many pictures on a GPU.")

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other; give one of them")


def load_finetune(arguments: LoadArguments) -> Editor:
    """An editor from a fine-tune, the shipped one if none is named; a missing CLEAR head is an error."""
    from thinkclearly.models.finetunes import TINY_CLEAR, load_clear_model

    return _load(arguments, partial(load_clear_model, merge=True), shipped=str(TINY_CLEAR))


def load_any(arguments: LoadArguments) -> Editor:
    """A base model where there are only its own files, else a fine-tune; the shipped base if none is named."""
    from thinkclearly.models import finetunes

    return _load(arguments, finetunes.load_any, shipped="tiny")


def _load(arguments: LoadArguments, load, shipped: str) -> Editor:
    import torch
    from accelerate import PartialState

    from thinkclearly.editing.editor import Editor
    from thinkclearly.models.finetunes import SHIPPED
    from thinkclearly.models.quantization import quantization

    device = arguments.device or PartialState().device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    options = {"dtype": getattr(torch, arguments.dtype), "device": device}
    if arguments.load_in_8bit or arguments.load_in_4bit:
        bits = 8 if arguments.load_in_8bit else 4
        options["quantization_config"] = quantization(bits, options["dtype"])
    if arguments.base:
        options["base"] = arguments.base
    if arguments.model is None and PartialState().is_main_process:
        logger.info("%s; name another with --model", SHIPPED)
    editor = Editor(*load(arguments.model or shipped, **options))
    if arguments.compile:
        # Prompts, blocks and what the cache holds have other lengths in every pass.
        editor.model.token_model.language_model.compile(dynamic=True)
    return editor


def weights(arguments: LoadArguments) -> dict:
    """What a folder of results has to say of the weights that it came from."""
    names = ("model", "base", "dtype")
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if getattr(arguments, name)}
    return {name: getattr(arguments, name) for name in names} | bits


class Bar:
    """A progress bar with the editor's callback signature."""

    def __init__(self, title: str):
        from tqdm.auto import tqdm

        self.bar = tqdm(desc=title, unit="token")

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
