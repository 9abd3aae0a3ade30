"""Pictures of noise, which no two tests can mistake for each other."""

import io

import numpy as np
from PIL import Image


def photo(seed, width=40, height=30):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
