"""Answer a question about a picture."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from thinkclearly.commands.loading import LoadArguments, load_any
from thinkclearly.decoding.settings import check_seed
from thinkclearly.recipe import RecipeParser, option


@dataclass
class DescribeArguments(LoadArguments):
    """Words about a picture."""

    model: str = field(
        default="", metadata={"help": "Folder or Hub id of a Janus or Chameleon model.", "required": True}
    )
    image: str = field(default="", metadata={"help": "Picture to look at.", "required": True})
    question: str = option("What is in the picture?", "Question about it.")
    num_answers: int = option(1, "Samples.")
    max_new_tokens: int = option(128, "Length limit of an answer, tokens.")
    temperature: float = option(0.0, "0 answers greedily.")
    top_k: int = option(0, "Sample from the k best words; 0 for all.")
    top_p: float = option(1.0, "Sample from the smallest set of words with this probability mass.")
    seed: int = option(0, "Seed of the sampling.")

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.seed)


def main(argv: list[str] | None = None) -> None:
    (arguments,) = RecipeParser(DescribeArguments, prog="thinkclearly describe", description=__doc__).parse(argv)
    names = ("num_answers", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(arguments, name) for name in names}
    for answer in load_any(arguments).describe(arguments.image, arguments.question, **options):
        sys.stdout.write(answer + "\n")
