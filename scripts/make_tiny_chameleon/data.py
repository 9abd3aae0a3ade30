"""Scenes as the tiny Chameleon is trained on them: pixels, and what is where, patch by patch.

Knows the sizes of the tiny model's pictures and nothing of its networks.
"""

import numpy as np

from thinkclearly.data.shapes import PALETTE, SHAPES, Scene
from thinkclearly.data.sources import OFFSETS
from thinkclearly.data.thoughts import direct

IMAGE_SIZE, PATCH = 64, 8
GRID = IMAGE_SIZE // PATCH
TOKENS = GRID**2


def wanted_pictures(seed: int, count: int, split: str = "train") -> np.ndarray:
    """Pictures that prompts ask for, uint8 (count, S, S, 3)."""
    scenes = (direct(seed, OFFSETS[split] + number).scenes[0] for number in range(count))
    return np.stack([np.asarray(scene.render(IMAGE_SIZE)) for scene in scenes])


def patch_contents(scene: Scene) -> np.ndarray:
    """Shape and colour in each patch, int64 (N, 2): the shape that covers at least 3 of 10 pixels, else the ground."""
    cover = np.zeros((len(scene.shapes) + 1, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for layer, shape in zip(cover[1:], scene.shapes):
        left, top, right, bottom = shape.box(IMAGE_SIZE, IMAGE_SIZE)
        layer[top:bottom, left:right] = shape.coverage(IMAGE_SIZE, IMAGE_SIZE)
    share = cover.reshape(-1, GRID, PATCH, GRID, PATCH).mean((2, 4)).reshape(-1, TOKENS)
    share[0] = 0.3
    ground = 1 + list(PALETTE).index(scene.background.name) if scene.background.name else 0
    table = [(0, ground)] + [(1 + SHAPES.index(s.name), 1 + list(PALETTE).index(s.colour)) for s in scene.shapes]
    return np.asarray(table)[share.argmax(0)]
