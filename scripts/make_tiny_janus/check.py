"""What a tiny base model can do: edits that are done, by operation, and how many its autoencoder lets through.

Knows the models by their folders only.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from data import IMAGE_SIZE, TOKENS, Edits

from thinkclearly.data.shapes import OPERATIONS, packaged_photos, random_edit
from thinkclearly.editing.editor import Editor
from thinkclearly.images import to_image
from thinkclearly.models.finetunes import load_base

SEED, BATCH = 77, 30


def check(model: Path, count: int = 150) -> None:
    """Prints a table: done of the base's own greedy edits, and of the true targets through the autoencoder."""
    editor, photos = Editor(*load_base(str(model))), packaged_photos("test")
    data = Edits(SEED, photos, OPERATIONS, square=True)
    done = defaultdict(list)
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        edits = [random_edit(SEED, i, photos) for i in numbers]
        pictures, words = [edit.render(IMAGE_SIZE)[0] for edit in edits], [edit.instruction for edit in edits]
        results = editor.edit_many(pictures, words, use_cfg=False, temperature=0.0)
        for edit, number, result in zip(edits, numbers, results):
            ceiling = to_image(editor.model.token_model.decode(true_tokens(editor, data[number]))[0])
            done[edit.operation].append((edit.is_done(result.raw), edit.is_done(ceiling)))
    done["all"] = sum(done.values(), [])
    for operation, rows in done.items():
        own, ceiling = np.mean(rows, axis=0)
        print(f"{operation:10} {len(rows):4} edits: done {own:.0%}, target's codes {ceiling:.0%}")  # noqa: T201


def true_tokens(editor: Editor, row) -> torch.Tensor:
    """Codes of the target, the source's where no pixel changed: long (1, N)."""
    pixels = torch.from_numpy(row[2]).permute(0, 3, 1, 2).float() / 127.5 - 1
    source, target = editor.model.token_model.encode(pixels)
    return torch.where(torch.from_numpy(row[3]), source, target).view(1, TOKENS)
