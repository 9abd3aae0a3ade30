"""Fit the gate of a fine-tune to records held out for that; stored in its folder (train does it by itself)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from thinkclearly.commands.loading import LoadArguments, load_finetune
from thinkclearly.recipe import RecipeParser, option


@dataclass
class CalibrateArguments(LoadArguments):
    """A fine-tune whose gate is fitted to held-out records."""

    model: str = option("outputs/clear", "Folder of the fine-tune, where the result is written.")
    batch_size: int = option(16, "Pictures that are edited at once.")


def main(argv: list[str] | None = None) -> None:
    from accelerate import PartialState

    from thinkclearly.data.options import DataArguments
    from thinkclearly.data.splits import build_data
    from thinkclearly.evaluation.calibration import calibrate
    from thinkclearly.models.instruction_head import CONFIG_FILE, write_clear_config
    from thinkclearly.models.load import Checkpoint
    from thinkclearly.training.methods import all_option_classes

    options = [CalibrateArguments, DataArguments]
    parser = RecipeParser(options, skipped=all_option_classes(), prog="thinkclearly calibrate", description=__doc__)
    arguments, data = parser.parse(argv)
    if not (Path(arguments.model) / CONFIG_FILE).is_file():
        raise ValueError(f"model={arguments.model!r} is no folder with a {CONFIG_FILE}; calibrate where you can write")
    editor = load_finetune(arguments)
    checkpoint, instructions = Checkpoint(editor.model.base, editor.processor), editor.model.vocabulary.names
    rows = build_data(data, checkpoint, ["calibration"], instructions).calibration
    if rows is None:
        raise ValueError(
            f"calibration_edits={data.calibration_edits}, source={data.source}: no held-out records with pictures"
        )
    if not PartialState().is_main_process:
        return
    found = calibrate(editor, rows, arguments.batch_size)
    write_clear_config(editor.model.clear_config, arguments.model)
    sys.stdout.write("".join(f"{name} {value:.4g}\n" for name, value in found.items() if value is not None))
