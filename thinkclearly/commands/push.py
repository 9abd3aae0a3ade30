"""Upload to the Hub: `thinkclearly push DIR --repo_id you/name`; given again it sends what is missing."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field

from thinkclearly.recipe import DTYPES, RecipeParser, check_choice, option

logger = logging.getLogger(__name__)

USAGE = "thinkclearly push [recipe.yaml | DIR] --repo_id you/name [--key value …]"


@dataclass
class PushArguments:
    """A repository on the Hub: a fine-tune, its merged weights, or tokenized data."""

    model: str = option("outputs/clear", "Folder that train wrote, a checkpoint in it, or a folder of prepared data.")
    repo_id: str = field(default="", metadata={"help": "Where to: owner/name, made if not there.", "required": True})
    private: bool = option(False, "Make a new repository private; else it is what the account's default says.")
    revision: str | None = option(None, "Branch to push to, made if not there; main if not given.")
    create_pr: bool = option(False, "Open a pull request instead of committing.")
    token: str | None = option(None, "Write token; better: `hf auth login` or HF_TOKEN, which no process list shows.")
    base_model_id: str | None = option(None, "Hub id of the base model, where training used a local folder.")
    license: str | None = option(None, "License of the card; what the base model's page says if not given.")
    share_samples: bool | None = option(
        None, "Share the sample edits, held-out pictures with instructions; if not given, only those of public data."
    )
    pt: bool = option(False, "Add original/, the same fine-tune with gen_head_clear.pt for the original's script.")
    merged: str | None = option(None, "Whole weights instead of an adapter: native or deepseek layout.")
    dtype: str = option("bfloat16", "merged: float32, bfloat16 or float16.")
    max_shard_size: str = option("5GB", "merged: largest weight file.")

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        if self.merged is not None:
            check_choice("merged", self.merged, ("native", "deepseek"))


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "--model")
    (arguments,) = RecipeParser(PushArguments, usage=USAGE, prog="thinkclearly push", description=__doc__).parse(argv)

    import torch

    from thinkclearly.hub import publish

    options = vars(arguments)
    options |= {"private": arguments.private or None, "dtype": getattr(torch, arguments.dtype)}
    commit = publish.push(options.pop("model"), **options)
    logger.info("%s", commit.pr_url or commit.commit_url)
