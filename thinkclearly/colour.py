"""What the numbers of a picture mean: colour profiles, transparency and bit depth, for the model and back.

A *photo* is an 8-bit RGB or RGBA picture in its file's own colours. The model sees `seen(photo)`; what it draws comes
back into the photo's colours with `painted`, so that pixels nobody changed never go through a conversion.
Works on decoded pictures. Knows nothing of files or models.
"""

from __future__ import annotations

import io
import math
import re
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms

PROFILE, METADATA = "icc_profile", ("icc_profile", "dpi", "exif")
SRGB = ImageCms.createProfile("sRGB")
# Storage modes of more than 8 bits a channel; "BGR;16" is 5, 6 and 5 bits.
DEEP_MODE = re.compile(r"(?:I|F|(?:L|LA|RGBX?|RGB[Aa]|CMYK);16).*")
# A TIFF keeps its layout among its EXIF tags; these say something of the picture.
TIFF_GROUPS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
TIFF_TAGS = [ExifTags.Base[tag] for tag in "ImageDescription Make Model DateTime Artist Copyright".split()]


def is_deep(image: Image.Image) -> bool:
    """Whether a picture that is not loaded yet has more than 8 bits a channel. Loading may already reduce it."""
    modes = [image.mode]
    for *_, arguments in getattr(image, "tile", ()):
        modes += [arguments] if isinstance(arguments, str) else list(arguments or ())[:1]
    return any(isinstance(mode, str) and DEEP_MODE.fullmatch(mode) for mode in modes)


def exif_of(stored: Image.Image, upright: Image.Image) -> bytes:
    """EXIF data without orientation and thumbnail, which would go on showing the picture as it was.

    Args:
        stored: the picture as its file has it, still open.
        upright: the same after `ImageOps.exif_transpose`.
    """
    exif = upright.getexif()
    if stored.format == "TIFF":
        exif, tags = Image.Exif(), stored.getexif()
        for tag in {*TIFF_TAGS, *TIFF_GROUPS}.intersection(tags):
            exif[tag] = tags.get_ifd(tag) if tag in TIFF_GROUPS else tags[tag]
    exif.pop(ExifTags.Base.Orientation, None)
    return exif.tobytes() if exif else b""


def to_photo(image: Image.Image, deep: bool) -> Image.Image:
    """Any decoded picture as a photo: RGB or RGBA, 8 bits, in its own colours.

    `info` holds `icc_profile`, `dpi` and `exif` where the picture has them, and `notes`, a tuple of sentences about
    what could not be kept. Profiles of grey and CMYK pictures do not fit RGB, so these are converted to sRGB.

    Args:
        image: upright.
        deep: it had more than 8 bits a channel.

    Raises:
        ValueError: grey values that are not in the range of any known kind.
    """
    notes = list(image.info.get("notes", ()))
    if deep:
        notes.append("The source has more than 8 bits a channel; it is edited and saved in 8 bits.")
    info = {key: image.info[key] for key in METADATA if image.info.get(key)}
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    space = {"1": "GRAY", "L": "GRAY", "LA": "GRAY", "CMYK": "CMYK"}.get(image.mode, "RGB ")
    if image.mode != "CMYK":
        opaque = image.convert("RGBA") if alpha else image  # a palette may have its own transparency
        image = opaque.convert("L" if space == "GRAY" else "RGB")
    profile = info.pop(PROFILE, None)
    try:
        if profile is not None and _space_of(profile) != space:
            raise ValueError(f"it is for {_space_of(profile).strip()}, the picture is {space.strip()}")
        if profile is not None and _reversible(profile):
            info[PROFILE] = profile
        elif profile is not None:
            image = _convert(image, profile)
            notes.append(f"The source's {space.strip()} colours were converted to sRGB through its profile.")
        elif space == "CMYK":
            notes.append("The source is CMYK without a colour profile; it was converted to RGB.")
    except (ValueError, OSError, ImageCms.PyCMSError) as error:
        notes.append(f"The source's colour profile cannot be used ({error}); its colours are taken as sRGB.")
    photo = image.convert("RGB")
    if alpha is not None:
        photo.putalpha(alpha)
    if "dpi" in info:
        info["dpi"] = tuple(map(float, info["dpi"]))
        if not all(1 < dpi < math.inf for dpi in info["dpi"]):  # 1 is Pillow's word for a TIFF that has none
            del info["dpi"]
    return with_metadata(photo, info | ({"notes": tuple(dict.fromkeys(notes))} if notes else {}))


def seen(photo: Image.Image) -> Image.Image:
    """A photo as people see it: RGB in sRGB, transparency laid over white as viewers and web pages do.

    Plain `convert("RGB")` would reveal the hidden colours underneath.
    """
    colours = photo.convert("RGB")
    if profile := photo.info.get(PROFILE):
        colours = _convert(colours, profile)
    if photo.mode == "RGBA":
        colours.putalpha(photo.getchannel("A"))
        colours = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), colours).convert("RGB")
    colours.info = {}
    return colours


def painted(drawn: Image.Image, photo: Image.Image) -> Image.Image:
    """The inverse of `seen`: what the model drew (RGB in sRGB, over white) in the photo's mode, colours and alpha."""
    result = drawn
    if photo.mode == "RGBA":
        pixels, alpha = np.array(drawn), np.asarray(photo.getchannel("A"))
        partial = (alpha > 0) & (alpha < 255)
        share = alpha[partial][:, None] / 255
        pixels[partial] = np.clip(np.rint(255 - (255 - pixels[partial]) / share), 0, 255)
        result = Image.fromarray(pixels)
    if profile := photo.info.get(PROFILE):
        result = _convert(result, profile, back=True)
    if photo.mode == "RGBA":
        result = result.copy()
        result.putalpha(photo.getchannel("A"))
    return result


def with_metadata(picture: Image.Image, info: dict) -> Image.Image:
    """Gives `picture` a photo's `info`, so that `picture.save` writes profile, resolution and EXIF in any format.

    Left to itself, Pillow writes the profile in some formats, and resolution and EXIF in none.
    """
    picture.info = dict(info)
    picture.encoderinfo = {key: info[key] for key in METADATA if key in info}
    return picture


def _deep_grey(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits: integers are 16-bit samples; floats lie in [0, 1] or, failing that, in [0, 255]."""
    values = np.asarray(image).astype(np.float64)
    top = 65535.0 if image.mode != "F" else 1.0 if values.max() <= 1 else 255.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise ValueError(
            f"grey values from {values.min():g} to {values.max():g} in mode {image.mode!r}; "
            f"expected 0 to {top:g}. Convert it to 8 bits first."
        )
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))


def _convert(image: Image.Image, profile: bytes, back: bool = False) -> Image.Image:
    transform = _transform(profile, image.mode, back)
    return image if transform is None else ImageCms.applyTransform(image, transform)


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str, back: bool = False) -> ImageCms.ImageCmsTransform | None:
    """From `mode` in a profile to RGB in sRGB, or back; None where that changes nothing, as for most cameras' sRGB."""
    ends = [_open(profile), SRGB]
    options = {"renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC}
    options["flags"] = ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(*(ends[::-1] if back else ends), mode, "RGB", **options)
    if mode != "RGB":
        return transform
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    found = np.asarray(ImageCms.applyTransform(Image.fromarray(lattice), transform))
    return None if np.abs(found.astype(int) - lattice).max() <= 1 else transform


def _open(profile: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile))


def _space_of(profile: bytes) -> str:
    """Four letters: "RGB ", "GRAY", "CMYK", …"""
    return _open(profile).profile.xcolor_space


def _reversible(profile: bytes) -> bool:
    """Whether painted pixels can be brought back into it; a scanner's profile, say, leads one way only."""
    if _space_of(profile) != "RGB ":
        return False
    _transform(profile, "RGB")
    try:
        _transform(profile, "RGB", back=True)
    except ImageCms.PyCMSError:
        return False
    return True
