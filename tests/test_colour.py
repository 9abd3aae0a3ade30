"""A photo keeps its colours, transparency and metadata; the model sees what people see."""

import io
import struct
import zlib

import icc
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from thinkclearly.colour import painted, seen
from thinkclearly.images import load_image, load_photo

P3, SRGB = icc.display_p3(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXACT = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True, "exact": True}}


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode="RGB", width=40, height=30, seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode if channels == 4 else None)


def smooth(width=40, height=30):
    """Colours inside sRGB whatever the profile: no channel is far from the others."""
    ramp = np.linspace(60, 200, width).astype(np.uint8)
    pixels = np.stack(
        [np.tile(ramp, (height, 1)), np.full((height, width), 120), np.tile(ramp[::-1], (height, 1))], -1
    )
    return Image.fromarray((pixels * 0.9).astype(np.uint8))


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


def png_of_16_bits(pixels):
    """uint16 (H, W, 3), which Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["JPEG", *EXACT])
def test_a_display_p3_photo_stays_as_it_is_and_is_seen_in_srgb(format):
    data = encoded(smooth(), format, icc_profile=P3, **EXACT.get(format, {}))
    photo, stored = load_photo(data), Image.open(io.BytesIO(data)).convert("RGB")
    assert photo.mode == "RGB" and np.array_equal(photo, stored) and photo.info["icc_profile"] == P3
    options = {"renderingIntent": 1, "flags": ImageCms.Flags.BLACKPOINTCOMPENSATION}
    profiles = ImageCms.ImageCmsProfile(io.BytesIO(P3)), ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(stored, *profiles, **options)
    assert np.array_equal(load_image(data), expected) and difference(expected, stored) > 8
    assert difference(painted(seen(photo), photo), photo) <= 2, "there and back, rounded to bytes twice"


def test_srgb_red_in_display_p3_is_the_published_triple():
    photo = load_photo(encoded(Image.new("RGB", (16, 16)), icc_profile=P3))
    red = painted(Image.new("RGB", (16, 16), (255, 0, 0)), photo)
    assert (
        difference(red, Image.new("RGB", (16, 16), (234, 51, 35))) <= 1
    )  # CSS Color 4: color(display-p3 .917 .2 .139)


def test_a_picture_that_says_it_is_srgb_is_seen_byte_for_byte():
    data = encoded(noise(), icc_profile=SRGB)
    assert np.array_equal(load_image(data), noise()) and load_photo(data).info["icc_profile"] == SRGB
    assert np.array_equal(painted(noise(), load_photo(data)), noise())


def test_profiles_that_do_not_fit_rgb_are_used_up():
    photo = load_photo(encoded(Image.new("L", (16, 16), 100), icc_profile=icc.grey(1.8)))
    linear = (100 / 255) ** 1.8
    assert photo.getpixel((0, 0)) == (round(255 * (1.055 * linear ** (1 / 2.4) - 0.055)),) * 3
    assert "icc_profile" not in photo.info and "GRAY colours were converted to sRGB" in photo.info["notes"][0]
    # Inks of another world: cyan is red here, the other three are grey.
    inks = [
        [(100 - 50 * c) * (1 - max(m, y, k) * 0.9), 60 * c, 40 * c]
        for c in (0, 1)
        for m in (0, 1)
        for y in (0, 1)
        for k in (0, 1)
    ]
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF", icc_profile=icc.table(b"CMYK", inks))
    photo = load_photo(data)
    red, green, blue = photo.getpixel((0, 0))
    assert red > green + 80 and "CMYK colours were converted" in photo.info["notes"][0]
    plain = load_photo(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF"))
    assert plain.getpixel((0, 0)) == (0, 255, 255) and "CMYK without a colour profile" in plain.info["notes"][0]
    scanner = icc.table(b"RGB ", [[50 * (r + g), 50 * b, 0] for r in (0, 1) for g in (0, 1) for b in (0, 1)])
    photo = load_photo(encoded(noise(), icc_profile=scanner))
    assert "RGB colours were converted" in photo.info["notes"][0] and not np.array_equal(photo, noise())
    assert np.array_equal(seen(photo), photo)


@pytest.mark.parametrize("profile", [b"no profile", P3[:200], icc.grey(2.2)], ids=["text", "cut", "grey"])
def test_a_profile_that_cannot_be_used_is_named_and_left_out(profile):
    photo = load_photo(encoded(noise(), icc_profile=profile))
    assert np.array_equal(photo, noise()) and "icc_profile" not in photo.info
    assert "profile cannot be used (" in photo.info["notes"][0]


def test_transparency_stays_in_every_mode():
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    sources = {
        "RGBA": (Image.new("RGBA", (16, 16), (200, 0, 0, 0)), {}, (200, 0, 0, 0)),
        "LA": (Image.new("LA", (16, 16), (7, 128)), {}, (7, 7, 7, 128)),
        "P": (palette, {"transparency": 1}, (10, 20, 30, 0)),
        "opaque P": (palette, {"icc_profile": P3}, (10, 20, 30)),
        "half P": (palette, {"transparency": b"\0\x64"}, (10, 20, 30, 100)),
        "RGB": (Image.new("RGB", (16, 16), (1, 2, 3)), {"transparency": (1, 2, 3)}, (1, 2, 3, 0)),
        "L": (Image.new("L", (16, 16), 9), {"transparency": 9}, (9, 9, 9, 0)),
    }
    for name, (image, options, pixel) in sources.items():
        photo = load_photo(encoded(image, **options))
        assert photo.getpixel((3, 3)) == pixel, name
        assert photo.info.get("icc_profile") == options.get("icc_profile")
        again = load_photo(photo)
        assert np.array_equal(again, photo) and again.mode == photo.mode and again.info == photo.info
    assert load_photo(Image.new("PA", (16, 16), (0, 50))).mode == "RGBA"


def test_painting_under_glass_is_the_inverse_of_laying_over_white():
    pixels = np.asarray(noise("RGBA")).copy()
    pixels[..., 3] = np.linspace(0, 255, 40).astype(np.uint8)
    photo = load_photo(encoded(Image.fromarray(pixels), icc_profile=SRGB))
    again = painted(seen(photo), photo)
    assert np.array_equal(again.getchannel("A"), photo.getchannel("A"))
    assert difference(seen(again), seen(photo)) <= 1
    opaque = pixels[..., 3] == 255
    assert np.array_equal(np.asarray(again)[opaque], pixels[opaque])


def test_more_than_8_bits_are_said_to_be_lost(caplog):
    deep = np.full((16, 16), 0x8080, np.uint16)
    floats = Image.fromarray(np.full((16, 16), 0.5, np.float32))
    sixteen = encoded(Image.fromarray(deep)), encoded(Image.fromarray(deep), "TIFF"), encoded(floats, "TIFF")
    for source in (*sixteen, png_of_16_bits(np.stack([deep] * 3, axis=-1)), Image.fromarray(deep), floats):
        photo = load_photo(source)
        assert photo.getpixel((0, 0)) == (128,) * 3 and "more than 8 bits" in photo.info["notes"][0]
    for source in (noise(), encoded(noise()), encoded(noise("L")), encoded(noise(), "JPEG"), encoded(noise(), "BMP")):
        assert "notes" not in load_photo(source).info


@pytest.mark.parametrize("format", ["JPEG", *EXACT])
def test_exif_resolution_and_profile_survive_saving_and_the_orientation_is_used_up(format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = 6, "Ada"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.LensModel: "50 mm"}
    options = {"exif": exif.tobytes(), "icc_profile": P3, "dpi": (300, 300)}
    data = encoded(smooth(), format, **options, **EXACT.get(format, {}))
    photo = load_photo(data)
    assert photo.size == (30, 40)
    for other in ["JPEG", *EXACT]:
        found = Image.open(io.BytesIO(encoded(photo, other, **EXACT.get(other, {}))))
        assert found.size == (30, 40) and found.info["icc_profile"] == P3
        tags = found.getexif()
        assert ExifTags.Base.Orientation not in tags and tags[ExifTags.Base.Artist] == "Ada"
        assert tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] == "50 mm"
        if other != "WEBP" and format != "WEBP":  # it has no place for a resolution
            assert np.allclose(found.info["dpi"], 300, atol=0.1)
        if other in EXACT:
            assert np.array_equal(found, photo)


def test_the_thumbnail_goes_as_it_shows_the_picture_before_the_edit():
    exif = b"Exif\0\0" + b"II*\0\x08\0\0\0" + b"\x01\0" + struct.pack("<HHI4s", 0x13B, 2, 4, b"Ada\0")
    exif += (
        struct.pack("<I", 26)
        + b"\x02\0"
        + struct.pack("<HHII", 0x201, 4, 1, 56)
        + struct.pack("<HHII", 0x202, 4, 1, 9)
    )
    exif += struct.pack("<I", 0) + b"THUMBNAIL"
    data = encoded(noise(), "JPEG", exif=exif)
    assert b"THUMBNAIL" in data
    kept = load_photo(data).info["exif"]
    assert b"Ada" in kept and b"THUMBNAIL" not in kept


def test_loading_leaves_a_callers_picture_alone():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.open(io.BytesIO(encoded(noise(), "JPEG", exif=exif)))
    before = dict(picture.info)
    assert load_photo(picture).size == load_photo(picture).size == (30, 40)
    assert picture.info == before and picture.getexif()[ExifTags.Base.Orientation] == 6
