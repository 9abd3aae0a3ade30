"""A look at token streams before they are trained on: how long they are, what of them is copied, and examples.

Writes `statistics.json` and `examples.png`. Knows nothing of training.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from thinkclearly.data.splits import PreparedData
from thinkclearly.files import replacing, write_json
from thinkclearly.images import to_image
from thinkclearly.models.load import Checkpoint
from thinkclearly.reporting.pictures import sheet

logger = logging.getLogger(__name__)


def inspect_thoughts(
    prepared: PreparedData, checkpoint: Checkpoint, directory: str | Path, examples: int = 8, seed: int = 0
) -> dict:
    """Measures the training streams, and draws random ones: pictures as their codes decode, over the words before.

    Returns:
        `dict`: the content of `statistics.json`. `left_out` are the records of all parts that were too long,
        `clear_ratio` is the share of edited pictures' patches that are the source's own, None without edits.
    """
    directory, streams, n = Path(directory), prepared.train, checkpoint.processor.num_image_tokens
    lengths, copied, pictures = [], [], []
    for row in streams.select_columns(["input_ids", "edit_of", "copied"]).with_format("numpy"):
        lengths.append(len(row["input_ids"]))
        pictures.append(len(row["edit_of"]))
        copied += list(row["copied"].reshape(-1, n)[row["edit_of"] >= 0].mean(1))
    statistics = {
        "records": len(streams),
        "left_out": prepared.left_out,
        "tokens": {"mean": float(np.mean(lengths)), "most": int(max(lengths))},
        "pictures": sum(pictures),
        "edits": len(copied),
        "clear_ratio": float(np.mean(copied)) if copied else None,
    }
    write_json(directory / "statistics.json", statistics)
    chosen = np.random.default_rng(seed).choice(len(streams), min(examples, len(streams)), replace=False)
    with replacing(directory / "examples.png") as temporary:
        rows = [_pictures(row, checkpoint) for row in streams.select(np.sort(chosen))]
        sheet(rows).save(temporary, format="PNG")
    logger.info("%d thoughts, %d left out; statistics and examples in %s", len(streams), prepared.left_out, directory)
    return statistics


def _pictures(row: dict, checkpoint: Checkpoint) -> list[tuple[Image.Image, str]]:
    """A stream's pictures with the words before each; what follows the last one stands under it as well."""
    processor, n = checkpoint.processor, checkpoint.processor.num_image_tokens
    code_of, ids, end, cells = {t: c for c, t in enumerate(processor.code_ids)}, row["input_ids"], 0, []
    for start in row["picture_starts"]:
        codes = torch.tensor([[code_of[token] for token in ids[start : start + n]]])
        cells.append((to_image(checkpoint.token_model.decode(codes)[0]), processor.decode_words(ids[end : start - 1])))
        end = start + n + 1
    rest = processor.decode_words(ids[end:]).strip()
    if not cells:
        return [(Image.new("RGB", (processor.image_size, 16), "white"), rest)]
    return [*cells[:-1], (cells[-1][0], f"{cells[-1][1]} … {rest}" if rest else cells[-1][1])]
