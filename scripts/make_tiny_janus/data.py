"""Random edits as the tiny Janus is trained on them: text, pixels, and what is where, patch by patch.

Knows the sizes of the tiny model's pictures and nothing of its networks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from thinkclearly.data.shapes import OPERATIONS, PALETTE, SHAPES, Scene, packaged_photos, picture_size, random_edit
from thinkclearly.images import Letterbox, patch_difference

IMAGE_SIZE, PATCH = 64, 8
GRID = IMAGE_SIZE // PATCH
TOKENS = GRID**2
TOLERANCE = 16  # greatest pixel difference of a patch that counts as unchanged

# A new background changes most of a picture and is learned first: it gets a smaller share than the local edits.
LOCAL = tuple(name for name in OPERATIONS if name != "background")
MIXTURE = LOCAL * 2 + ("background",)


@dataclass
class Batch:
    """Rows of edits.

    Attributes:
        instructions, captions: words of the edit and of the source.
        pixels: float32 (B, 2, 3, S, S) in [-1, 1], source and target.
        unchanged: bool (B, N), patches whose pixels the edit leaves alone.
        contents: long (B, 2, N, 2), shape (0 for none, else 1 + index) and colour (the same) of source and target.
    """

    instructions: list[str]
    captions: list[str]
    pixels: torch.Tensor
    unchanged: torch.Tensor
    contents: torch.Tensor

    def __len__(self):
        return len(self.instructions)

    def rows(self, start: int, stop: int | None = None) -> "Batch":
        return Batch(*(part[start:stop] for part in vars(self).values()))


class Edits(Dataset):
    """Edits over `photos`; `square` keeps them from being letterboxed."""

    def __init__(self, seed: int, photos: list[str], operations=MIXTURE, square: bool = False):
        self.seed, self.photos, self.operations, self.square = seed, photos, operations, square

    def __len__(self):
        return 10**7

    def __getitem__(self, index):
        edit = random_edit(self.seed, index, self.photos, self.operations)
        size = (IMAGE_SIZE, IMAGE_SIZE) if self.square else picture_size(self.seed, index, IMAGE_SIZE)
        box = Letterbox(*size, IMAGE_SIZE)
        source, target = (np.asarray(box.fit(picture)) for picture in edit.render(*size)[:2])
        unchanged = patch_difference(source, target, PATCH).ravel() <= TOLERANCE
        contents = np.stack([patch_contents(scene, box) for scene in (edit.before, edit.after)])
        return edit.instruction, edit.before.caption(), np.stack([source, target]), unchanged, contents


def patch_contents(scene: Scene, box: Letterbox) -> np.ndarray:
    """Shape and colour in each patch, int64 (N, 2): the shape that covers at least 3 of 10 pixels, else the ground."""
    width, height = box.inner_width, box.inner_height
    cover = np.zeros((len(scene.shapes) + 1, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for layer, shape in zip(cover[1:], scene.shapes):
        left, top, right, bottom = shape.box(width, height)
        rows, columns = slice(box.top + top, box.top + bottom), slice(box.left + left, box.left + right)
        layer[rows, columns] = shape.coverage(width, height)
    share = cover.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(-1, TOKENS)
    share[0] = 0.3
    ground = 1 + list(PALETTE).index(scene.background.name) if scene.background.name else 0
    table = [(0, ground)] + [(1 + SHAPES.index(s.name), 1 + list(PALETTE).index(s.colour)) for s in scene.shapes]
    return np.asarray(table)[share.argmax(0)]


def collate(rows) -> Batch:
    instructions, captions, pixels, unchanged, contents = zip(*rows)
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    arrays = (torch.from_numpy(np.stack(part)) for part in (unchanged, contents))
    return Batch(list(instructions), list(captions), pixels, *arrays)


def batches(seed: int, size: int, square: bool = False):
    data = Edits(seed, packaged_photos("train"), OPERATIONS if square else MIXTURE, square)
    return iter(DataLoader(data, size, collate_fn=collate, num_workers=0))


def held_out(count: int = 128) -> Batch:
    data = Edits(5, packaged_photos("test"), OPERATIONS)
    return collate([data[i] for i in range(count)])
