"""The photographs that scikit-image and this package ship, for the built-in shapes to be drawn on."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from PIL import Image

from thinkclearly.images import load_image

# docs/credits.md; each part of the data draws on its own.
PACKAGED_PHOTOS = {
    "train": (
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/coffee.png"),
        ("skimage", "data/motorcycle_left.png"),
        ("skimage", "data/rocket.jpg"),
        ("skimage", "data/grass.png"),
        ("skimage", "data/brick.png"),
        ("thinkclearly", "photographs/china.jpg"),
    ),
    "calibration": (
        ("skimage", "data/hubble_deep_field.jpg"),
        ("skimage", "data/ihc.png"),
        ("skimage", "data/retina.jpg"),
    ),
    "test": (("skimage", "data/chelsea.png"), ("thinkclearly", "photographs/flower.jpg")),
}


def packaged_photo(package: str, name: str) -> str:
    """The path of one of `PACKAGED_PHOTOS`."""
    if (package, name) not in chain(*PACKAGED_PHOTOS.values()):
        raise ValueError(f"{package}/{name} is none of the photographs that ship; see PACKAGED_PHOTOS")
    spec = find_spec(package)
    if spec is None:
        raise ImportError(
            f"The built-in shapes draw on photographs that {package} ships, and it is not installed. Run "
            "`pip install scikit-image`, or give a folder of photographs (photos_folder)."
        )
    return str(Path(spec.origin).parent / name)


@lru_cache(maxsize=32)
def open_photo(path: str) -> Image.Image:
    return load_image(path)
