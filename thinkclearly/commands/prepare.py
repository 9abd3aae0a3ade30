"""Tokenize and label photo pairs, or thoughts; statistics, plots and a look at examples."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from thinkclearly.recipe import RecipeParser, option

logger = logging.getLogger(__name__)


@dataclass
class PrepareArguments:
    """What else preparation writes."""

    output_dir: str = option("outputs/data", "Where statistics, plots and the sheet of examples go.")
    jsonl: str | None = option(None, "Also write the training records as JSONL with '<CLEAR>' words to this file.")
    instructions: list[str] = option(["CLEAR"], "Instruction tokens that are labels, the first that holds.")
    export_folder: str | None = option(None, "Also write the photo pairs as sample_XXXX folders.")


def main(argv: list[str] | None = None) -> None:
    from accelerate import PartialState

    from thinkclearly.data.inspect import inspect_dataset
    from thinkclearly.data.interleaved import build_thoughts
    from thinkclearly.data.jsonl import write_jsonl
    from thinkclearly.data.options import DataArguments
    from thinkclearly.data.sources import read_example, write_folder
    from thinkclearly.data.splits import build_data
    from thinkclearly.data.thought_report import inspect_thoughts
    from thinkclearly.training.methods import all_option_classes
    from thinkclearly.training.options import ModelArguments
    from thinkclearly.training.setup import build_checkpoint

    options = [ModelArguments, DataArguments, PrepareArguments]
    parser = RecipeParser(options, skipped=all_option_classes(), prog="thinkclearly prepare", description=__doc__)
    model, data, output = parser.parse(argv)
    if output.export_folder and data.source in ("jsonl", "prepared"):
        raise ValueError(f"export_folder={output.export_folder!r} needs pictures, and {data.path} holds tokens only")
    checkpoint = build_checkpoint(model)
    if data.source == "thoughts" or data.thought_mode:
        if output.export_folder or output.jsonl:
            raise ValueError(
                "export_folder and jsonl are for photo pairs; thoughts are in a file of their own already"
            )
        streams = build_thoughts(data, checkpoint)
        if PartialState().is_main_process:
            inspect_thoughts(streams, checkpoint, output.output_dir)
        return
    prepared = build_data(data, checkpoint, instructions=output.instructions)
    if not PartialState().is_main_process:
        return
    if output.export_folder:
        count = write_folder(map(read_example, prepared.rows["train"]), output.export_folder)
        logger.info("%d samples in %s", count, output.export_folder)
    if output.jsonl:
        write_jsonl(prepared.train, output.jsonl, checkpoint.token_model.codebook_size, output.instructions)
    options = {"pixel_tolerance": data.pixel_tolerance, "instructions": output.instructions}
    inspect_dataset(prepared.train, checkpoint, output.output_dir, **options)
