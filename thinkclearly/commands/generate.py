"""Draw pictures from words."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from thinkclearly.commands.loading import Bar, LoadArguments, load_any
from thinkclearly.decoding.settings import check_seed
from thinkclearly.editing.settings import SettingOverrides, given
from thinkclearly.recipe import RecipeParser, option

logger = logging.getLogger(__name__)


@dataclass
class GenerateArguments(LoadArguments):
    """Pictures from words."""

    prompt: str = field(default="", metadata={"help": "What to draw.", "required": True})
    output_dir: str = option("outputs/generate", "Where 0000.png, 0001.png, … go.")
    num_images: int = option(1, "Samples.")
    seed: int = option(0, "Keys all noise.")

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.seed)


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser([GenerateArguments, SettingOverrides], prog="thinkclearly generate", description=__doc__)
    arguments, overrides = parser.parse(argv)
    editor = load_any(arguments)
    with Bar("decode") as bar:
        pictures = editor.generate(
            arguments.prompt,
            num_images=arguments.num_images,
            seed=arguments.seed,
            progress=bar,
            **given(overrides),
        )
    directory = Path(arguments.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for k, picture in enumerate(pictures):
        picture.save(directory / f"{k:04d}.png")
    logger.info("%d pictures in %s", len(pictures), directory)
