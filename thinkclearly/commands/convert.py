"""Rewrite a Janus checkpoint in the other layout: DeepSeek's or transformers'."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from thinkclearly.recipe import DTYPES, RecipeParser, check_choice, option


@dataclass
class ConvertArguments:
    """Between DeepSeek's file layout and transformers' own."""

    model: str = field(default="", metadata={"help": "Folder or Hub id, either layout.", "required": True})
    weights: str | None = option(None, "A state dict with DeepSeek's names, instead of the model's own weights.")
    output_dir: str = field(default="", metadata={"help": "Folder to write.", "required": True})
    to: str = option("native", "native (transformers) or deepseek.")
    dtype: str = option("bfloat16", "float32, bfloat16 or float16.")

    def __post_init__(self):
        check_choice("to", self.to, ("native", "deepseek"))
        check_choice("dtype", self.dtype, DTYPES)


def main(argv: list[str] | None = None) -> None:
    (arguments,) = RecipeParser(ConvertArguments, prog="thinkclearly convert", description=__doc__).parse(argv)
    directory = Path(arguments.output_dir)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder; give another one or remove it.")

    import torch

    from thinkclearly.models.folder import BY_NAME, read_model_config
    from thinkclearly.models.janus.export import export_deepseek
    from thinkclearly.models.load import load_checkpoint

    if read_model_config(BY_NAME.get(arguments.model, arguments.model))[1]["model_type"] == "chameleon":
        raise ValueError(f"{arguments.model} is a Chameleon, which has one layout; convert is for Janus.")
    checkpoint = load_checkpoint(arguments.model, weights=arguments.weights, dtype=getattr(torch, arguments.dtype))
    if arguments.to == "deepseek":
        # The tokenizer files as they are: transformers 5 would write a class that DeepSeek's code does not find.
        export_deepseek(checkpoint.network, directory, processor_source=checkpoint.network.name_or_path)
    else:
        checkpoint.network.save_pretrained(directory)
        checkpoint.processor.save_pretrained(directory)
