"""Pairs of random pictures in a folder, as a source reads them."""

import numpy as np
from PIL import Image

from thinkclearly.data import sources
from thinkclearly.data.sources import EditExample, write_folder


def noise(seed, width=50, height=40):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pairs(path, *examples):
    """A folder source with one sample per (source, target, mask)."""
    write_folder((EditExample(s, t, f"edit {i}", m) for i, (s, t, m) in enumerate(examples)), path)
    return sources.folder(path)
