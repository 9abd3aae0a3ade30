"""Think with pictures: draw, say what is wrong, draw again; or object by object, then all.

A page a thought is written to DIR/NUMBER/index.html, and DIR/index.html lists them. Beside the pages lie the pictures,
thoughts.jsonl (text, ids, passes, what changed) and the original's answers.jsonl and decoded_results.jsonl.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from thinkclearly.commands.loading import LoadArguments, load_any, weights
from thinkclearly.decoding.settings import check_seed
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.recipe import RecipeParser, option

logger = logging.getLogger(__name__)


@dataclass
class ThinkArguments(LoadArguments):
    """One prompt, or many: every process of an `accelerate launch` takes its share of `input`."""

    prompt: str | None = option(None, "What to think about: the picture that is wanted, in words.")
    input: str | None = option(
        None,
        'Instead of prompt: a .jsonl file of {"prompt", "images"?}; a line with a "response" of token ids, as the '
        "original's inference writes them, is decoded.",
    )
    output_dir: str = option("outputs/think", "Where thoughts go; the same command again goes on there.")
    num_thoughts: int = option(1, "Thoughts about each prompt.")
    seed: int = option(0, "Keys all noise: the same seed gives the same thought.")
    batch_size: int = option(8, "Thoughts that a process has at once.")

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.seed)
        if (self.prompt is None) == (self.input is None):
            raise ValueError("give either --prompt, what to think about, or --input, a .jsonl file of prompts")
        for name in ("num_thoughts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 or more")


def main(argv: list[str] | None = None) -> None:
    parser = RecipeParser([ThinkArguments, ThoughtSettings], prog="thinkclearly think", description=__doc__)
    arguments, settings = parser.parse(argv)

    from accelerate import PartialState

    from thinkclearly.data.thought_files import Prompt, read_prompts
    from thinkclearly.editing.thoughts import THOUGHTS_FILE, think_prompts
    from thinkclearly.evaluation.thought_pages import write_pages

    prompts = [Prompt(arguments.prompt)] if arguments.input is None else read_prompts(arguments.input)
    run = weights(arguments) | {name: getattr(arguments, name) for name in ("input", "seed", "num_thoughts")}
    options = {name: getattr(arguments, name) for name in ("num_thoughts", "batch_size", "seed")}
    made = think_prompts(load_any(arguments), prompts, arguments.output_dir, settings, run=run, **options)
    if PartialState().is_main_process:
        page = write_pages(arguments.output_dir, THOUGHTS_FILE)
        logger.info("%s: %d thoughts, %d new", page, len(prompts) * arguments.num_thoughts, made)
