"""Pictures in and out: safe loading, the square the model sees and its inverse, and pixel tensors.

Knows nothing of models, tokens or datasets. Every picture inside the package is a `PIL.Image` that came through
`load_photo` or `load_image`; every question of "which patch does this pixel belong to" is answered by
`Letterbox.patch_of_pixels`.
"""

from __future__ import annotations

import io
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps

from thinkclearly.colour import exif_of, is_deep, seen, to_photo

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs, about 13,300 x 13,300
MIN_SIDE = 8  # less is a tracking pixel or an icon, not a picture to edit
MAX_ASPECT = 100  # beyond it the short side would be under 4 of the model's 384 pixels
MASK_THRESHOLD = 127  # a mask pixel above it is set: drops JPEG noise, keeps the outer half of soft edges out
REFERENCE_MIN_SIDE = 14  # `min_size` of DeepSeek's VLMImageProcessor
PADDING = (127, 127, 127)  # int(0.5 * 255)


class ImageError(ValueError):
    """A picture that cannot be used; the message names it, says what was found and what to do."""


def load_image(source, name: str | None = None) -> Image.Image:
    """Read a picture as people and the model see it: upright, 8-bit RGB in sRGB, transparency laid over white.

    Args and errors as for `load_photo`.
    """
    return seen(load_photo(source, name))


def load_photo(source, name: str | None = None) -> Image.Image:
    """Read a picture as its file has it: upright, 8-bit RGB or RGBA, in its own colours; see `colour.to_photo`.

    EXIF orientation is applied. Palettes and colour keys become RGB or RGBA. 16-bit and float greys are scaled, not
    clipped. Of animations and multi-page files the first frame is read.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `PIL.Image.Image`, `numpy.ndarray` or `dict`): a path, an encoded file,
            a picture, uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or `{"path", "bytes"}` as
            `datasets.Image(decode=False)` gives.
        name (`str`, *optional*): what errors call the picture; defaults to its path.

    Returns:
        `PIL.Image.Image`: mode "RGB" or "RGBA", at least `MIN_SIDE` each side, at most `MAX_PIXELS` in all; a
        photo that went through `load_photo` before comes out the same.

    Raises:
        ImageError: missing, corrupt, truncated, of an unknown kind, or of an absurd size.
    """
    name = name or _name_of(source)
    image, deep = _decode(source, name)
    try:
        return to_photo(image, deep)
    except ValueError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:
        raise ImageError(
            f"{name}: cannot turn mode {image.mode!r} into RGB ({error}). Save it as PNG or JPEG."
        ) from error


def load_mask(source, name: str | None = None) -> Image.Image | None:
    """Read an edit mask: mode "L", 255 where the picture was edited.

    Two conventions are understood: a mask with transparency is edited where it is *transparent* (MagicBrush, DALL-E),
    any other is edited where it is *white*. A colour picture without transparency is neither: `None`.

    Args and errors as for `load_image`.
    """
    name = name or _name_of(source)
    image, deep = _decode(source, name)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] < 255:
            return ImageOps.invert(alpha)
    rgb = np.asarray(seen(to_photo(image, deep))).astype(np.int16)
    if np.ptp(rgb, axis=-1).max() > 16:
        return None
    return Image.fromarray(rgb.mean(-1).round().astype(np.uint8))


def _name_of(source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, Mapping):
        return source.get("path") or "picture"
    return getattr(source, "filename", "") or "picture"


def _decode(source, name: str) -> tuple[Image.Image, bool]:
    """Open, check the size in the header, decode and turn upright; the mode stays as it is in the file.

    Also tells whether the file has more than 8 bits a channel, which Pillow may not have kept.
    """
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if source is None:
        raise ImageError(f"{name}: there is no picture, neither bytes nor a path. Give one of the two.")
    if isinstance(source, np.ndarray):
        source = _from_array(source, name)
    if isinstance(source, Image.Image):
        return _checked(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        if os.path.exists(source) and not os.path.isfile(source):
            raise ImageError(f"{name}: cannot be read, it is no file but a folder, pipe or device. Check the path.")
    else:
        raise ImageError(
            f"{name}: cannot read a picture from {type(source).__name__}; expected a path, bytes, a PIL picture, "
            "a uint8 array or a dict with 'path' or 'bytes'."
        )
    try:
        with Image.open(source) as image:
            return _checked(image, name)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file. Check the path.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels ({error}). Shrink it first.") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in any format Pillow reads. Expected PNG, JPEG, WebP…") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ImageError(f"{name}: cannot be read ({error}). Is it cut short or damaged? Get it again.") from error


def _checked(image: Image.Image, name: str) -> tuple[Image.Image, bool]:
    if image.format == "EPS":  # decoding would run Ghostscript on the file
        raise ImageError(f"{name}: PostScript is a program, not a picture. Convert it to PNG first.")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width}x{height} is more than {MAX_PIXELS:,} pixels. Shrink it first.")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name}: {width}x{height} is too small; each side needs at least {MIN_SIDE} pixels.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name}: {width}x{height} is too long and thin; crop it to at most {MAX_ASPECT}:1.")
    deep = is_deep(image)
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"{name}: cannot be read ({error}). Is it cut short or damaged? Get it again.") from error
    damages = (SyntaxError, ValueError, OSError, LookupError, TypeError, AttributeError, struct.error)
    try:
        upright = ImageOps.exif_transpose(image)
    except damages as error:
        logger.warning("%s: the EXIF data is damaged (%s); its orientation is ignored", name, error)
        upright = image.copy()
    try:
        upright.info["exif"] = exif_of(image, upright)
    except damages as error:
        logger.info("%s: the EXIF data is damaged (%s) and left out", name, error)
        upright.info.pop("exif", None)
    return upright, deep


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not fits or 0 in pixels.shape:
        raise ImageError(
            f"{name}: an array of {pixels.dtype} {pixels.shape} is not a picture; "
            "expected uint8 (height, width) or (height, width, 1, 3 or 4)."
        )
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


@dataclass(frozen=True)
class Letterbox:
    """How a `width` x `height` picture sits in the model's `size` x `size` square, and the way back.

    The same arithmetic as DeepSeek's `VLMImageProcessor`: the long side becomes `size`, the short side is rounded
    down but never under 14 (which stretches pictures beyond 27:1), and grey 127 fills the rest.
    """

    width: int
    height: int
    size: int

    def __post_init__(self):
        if min(self.width, self.height) < 1 or self.size < REFERENCE_MIN_SIDE:
            raise ValueError(
                f"Letterbox({self.width}, {self.height}, {self.size}): expected a picture of at least 1x1 "
                f"and a square of at least {REFERENCE_MIN_SIDE}."
            )

    @property
    def inner_width(self) -> int:
        return max(int(self.width / max(self.width, self.height) * self.size), REFERENCE_MIN_SIDE)

    @property
    def inner_height(self) -> int:
        return max(int(self.height / max(self.width, self.height) * self.size), REFERENCE_MIN_SIDE)

    @property
    def left(self) -> int:
        return (self.size - self.inner_width) // 2

    @property
    def top(self) -> int:
        return (self.size - self.inner_height) // 2

    def fit(self, image: Image.Image) -> Image.Image:
        """RGB picture (width, height) → (size, size), bicubic with antialiasing, padded with grey."""
        self._expect(image, (self.width, self.height))
        inner = image.resize((self.inner_width, self.inner_height), Image.Resampling.BICUBIC)
        if inner.size == (self.size, self.size):
            return inner
        square = Image.new("RGB", (self.size, self.size), PADDING)
        square.paste(inner, (self.left, self.top))
        return square

    def unfit(self, square: Image.Image) -> Image.Image:
        """RGB picture (size, size) → (width, height): the padding is cut off, bicubic back to the source's size.

        The identity where the source is itself `size` x `size`.
        """
        self._expect(square, (self.size, self.size))
        box = (self.left, self.top, self.left + self.inner_width, self.top + self.inner_height)
        return square.crop(box).resize((self.width, self.height), Image.Resampling.BICUBIC)

    def _expect(self, image: Image.Image, size: tuple[int, int]) -> None:
        if image.size != size or image.mode != "RGB":
            raise ValueError(f"{self}: got a {image.mode} picture of {image.size}, expected RGB of {size}.")

    def patch_of_pixels(self, grid: int) -> tuple[np.ndarray, np.ndarray]:
        """The patch that the centre of each source pixel falls in: rows (height,) and columns (width,), int64.

        `grid` is the number of patches along a side of the square; values lie in [0, grid) and never decrease.
        """
        rows = _patches(self.height, self.top, self.inner_height, self.size, grid)
        return rows, _patches(self.width, self.left, self.inner_width, self.size, grid)

    def unfit_grid(self, mask: np.ndarray) -> np.ndarray:
        """Patches (grid, grid) → source pixels (height, width): each pixel takes the value of its patch."""
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
            raise ValueError(f"{self}: got a grid of shape {mask.shape}, expected (grid, grid).")
        rows, columns = self.patch_of_pixels(len(mask))
        return mask[rows[:, None], columns]

    def fit_mask(self, mask: Image.Image, grid: int) -> np.ndarray:
        """Source mask ("L" or "1", width x height) → patches, bool (grid, grid).

        A patch is set if any of its pixels is above `MASK_THRESHOLD`. Where a small source is enlarged so much that
        no pixel centre falls in a patch, the pixel at the patch's own centre decides.
        """
        if mask.size != (self.width, self.height):
            raise ValueError(f"{self}: got a mask of {mask.size}, expected {(self.width, self.height)}.")
        pixels = np.asarray(mask.convert("L")) > MASK_THRESHOLD
        result = np.zeros((grid, grid), bool)
        (rows, row_starts, row_patches), (columns, column_starts, column_patches) = self._pools(grid)
        pooled = np.logical_or.reduceat(pixels[rows], row_starts, axis=0)
        pooled = np.logical_or.reduceat(pooled[:, columns], column_starts, axis=1)
        result[np.ix_(row_patches, column_patches)] = pooled
        return result

    def content(self, grid: int) -> np.ndarray:
        """Patches that show some of the source, bool (grid, grid); the rest are pure padding."""
        result = np.zeros((grid, grid), bool)
        (_, _, rows), (_, _, columns) = self._pools(grid)
        result[np.ix_(rows, columns)] = True
        return result

    def _pools(self, grid: int):
        return (
            _pool(self.height, self.top, self.inner_height, self.size, grid),
            _pool(self.width, self.left, self.inner_width, self.size, grid),
        )


def _patches(length: int, start: int, inner: int, size: int, grid: int) -> np.ndarray:
    """Patch of each of `length` pixels spread over `inner` of the square's `size`, in exact integer arithmetic."""
    doubled = 2 * length * start + (2 * np.arange(length, dtype=np.int64) + 1) * inner  # centre * 2 * length
    return doubled * grid // (2 * length * size)


@lru_cache(maxsize=256)
def _pool(length: int, start: int, inner: int, size: int, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels grouped by patch, where each group begins, and the groups' patches: every patch of the box has one."""
    patches = _patches(length, start, inner, size, grid)
    pixels = np.arange(length)
    box = np.arange(start * grid // size, -(-(start + inner) * grid // size))
    without = np.setdiff1d(box, patches)
    centres = ((2 * without + 1) * size - 2 * grid * start) * length // (2 * grid * inner)
    pixels = np.concatenate([pixels, np.clip(centres, 0, length - 1)])
    patches = np.concatenate([patches, without])
    order = np.argsort(patches, kind="stable")
    kept, starts = np.unique(patches[order], return_index=True)
    return pixels[order], starts, kept


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle of a picture, (size, size): halved while both sides stay at least `size`, then bicubic, then cropped.

    As ADM, and FocusDiff after it, prepare pictures to learn from: `center_crop_arr` of
    [guided-diffusion](https://github.com/openai/guided-diffusion/blob/main/guided_diffusion/image_datasets.py).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixel_values(
    squares: Image.Image | Sequence[Image.Image],
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    rescale: float = 1 / 255,
) -> torch.Tensor:
    """RGB pictures (S, S) → float32 (B, 3, S, S), bit for bit as the reference: rescale in fp64, normalise in fp32."""
    squares = [squares] if isinstance(squares, Image.Image) else list(squares)
    sizes = {square.size for square in squares}
    if len(sizes) != 1 or any(square.mode != "RGB" for square in squares):
        found = ", ".join(f"{square.mode} {square.size}" for square in squares) or "no picture"
        raise ValueError(
            f"to_pixel_values: expected RGB pictures of one size, found {found}. Letterbox.fit them first."
        )
    pixels = np.stack([np.asarray(square) for square in squares])
    pixels = (pixels.astype(np.float64) * rescale).astype(np.float32)
    pixels = (pixels - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Pixels (3, S, S) in [-1, 1] → RGB picture; clipped and *truncated* to 8 bits in fp32, as the reference does."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"to_image: got shape {tuple(pixels.shape)}, expected (3, height, width).")
    values = pixels.detach().to("cpu", torch.float32).numpy().transpose(1, 2, 0)
    if not np.isfinite(values).all():
        raise ValueError("to_image: the pixels hold NaN or infinity; check the weights and the dtype of the decoder.")
    return Image.fromarray(np.clip((values + 1) / 2 * 255, 0, 255).astype(np.uint8))


def patch_difference(a: Image.Image, b: Image.Image, grid: int) -> np.ndarray:
    """Largest difference of any pixel and channel in each patch of two square pictures: uint8 (grid, grid)."""
    difference = np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max(-1)
    patch = len(difference) // grid
    return difference.reshape(grid, patch, grid, patch).max((1, 3)).astype(np.uint8)
