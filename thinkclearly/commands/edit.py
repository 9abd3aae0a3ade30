"""Edit a picture, or folders and data sets of them, by instructions; CLEAR patches stay byte-identical."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from thinkclearly.commands.loading import Bar, LoadArguments, load_finetune, weights
from thinkclearly.decoding.settings import check_seed
from thinkclearly.editing.settings import SettingOverrides, given
from thinkclearly.recipe import RecipeParser, check_choice, option

logger = logging.getLogger(__name__)


@dataclass
class EditArguments(LoadArguments):
    """One picture, or many: every process of an `accelerate launch` takes its share of `input`."""

    image: str | None = option(None, "Picture to edit, any size.")
    input: str | None = option(
        None, "Instead of image: a folder of pictures, a .jsonl file (image, instruction) or a data set."
    )
    instruction: str | None = option(None, "What to change; with input, where an item does not say it itself.")
    output_dir: str = option("outputs/edit", "Where the pictures and result.json go.")
    num_images: int = option(1, "Samples.")
    seed: int = option(0, "Keys all noise: the same seed gives the same picture.")
    trace: bool = option(False, "Write token_trace.jsonl, one line a position; not with input.")
    batch_size: int = option(8, "input: pictures that a process edits at once.")
    split: str = option("train", "input: split of a data set on the Hub.")
    on_bad_record: str = option("error", "input: error stops at a bad item, skip leaves it out and lists it.")

    def __post_init__(self):
        super().__post_init__()
        check_choice("on_bad_record", self.on_bad_record, ("error", "skip"))
        check_seed(self.seed)
        if (self.image is None) == (self.input is None):
            raise ValueError("give either --image, one picture, or --input, a folder, .jsonl file or data set")
        if self.image is not None and self.instruction is None:
            raise ValueError("--image needs --instruction: what to change, e.g. 'Make the scarf blue.'")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; expected 1 or more")


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser([EditArguments, SettingOverrides], prog="thinkclearly edit", description=__doc__)
    arguments, overrides = parser.parse(argv)
    if arguments.input is not None:
        return _edit_many(arguments, given(overrides))
    editor = load_finetune(arguments)
    with Bar("decode") as bar:
        results = editor.edit(
            arguments.image,
            arguments.instruction,
            num_images=arguments.num_images,
            seed=arguments.seed,
            progress=bar,
            **given(overrides),
        )
    for k, result in enumerate(results if arguments.num_images > 1 else [results]):
        directory = Path(arguments.output_dir) / (f"{k:04d}" if arguments.num_images > 1 else "")
        result.save(directory, trace=arguments.trace)
        logger.info("%s: %.0f%% of the pixels are the source's, byte for byte", directory, 100 * result.clear_fraction)


def _edit_many(arguments: EditArguments, settings: dict) -> None:
    from accelerate import PartialState

    from thinkclearly.editing.batch import edit_items, read_items

    with PartialState().main_process_first():
        options = arguments.instruction, arguments.split, arguments.on_bad_record, arguments.output_dir
        items, skipped = read_items(arguments.input, *options)
    names = ("input", "split", "seed", "num_images")
    report = edit_items(
        load_finetune(arguments),
        items,
        arguments.output_dir,
        run=weights(arguments) | {name: getattr(arguments, name) for name in names},
        skipped=skipped,
        batch_size=arguments.batch_size,
        num_images=arguments.num_images,
        seed=arguments.seed,
        on_bad_record=arguments.on_bad_record,
        **settings,
    )
    if PartialState().is_main_process:
        folder, left_out = arguments.output_dir, len(report.skipped)
        logger.info("%s: %d items, %d edited now, %d left out", folder, report.items, report.edited, left_out)
