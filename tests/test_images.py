import io
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import GOLDEN_ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from thinkclearly import images
from thinkclearly.images import (
    ImageError,
    Letterbox,
    center_crop,
    load_image,
    load_mask,
    to_image,
    to_pixel_values,
)
from thinkclearly.models.load import load_checkpoint


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# Loading


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    picture = photo()
    path = tmp_path / "a.png"
    picture.save(path)
    data = path.read_bytes()
    sources = [path, str(path), data, picture, np.asarray(picture), {"path": "gone.png", "bytes": data}]
    sources.append({"path": str(path), "bytes": None})
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(loaded, picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15] = 255  # white top left corner
    undo = {2: "fliplr", 3: "rot180", 4: "flipud", 5: "T", 6: "rot90", 7: "T180", 8: "rot270"}.get(orientation)
    stored = {
        None: lambda a: a,
        "fliplr": lambda a: a[:, ::-1],
        "flipud": lambda a: a[::-1],
        "rot180": lambda a: np.rot90(a, 2),
        "T": lambda a: a.transpose(1, 0, 2),
        "T180": lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        "rot90": lambda a: np.rot90(a, 1),  # shown turned clockwise
        "rot270": lambda a: np.rot90(a, -1),
    }[undo](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(load_image(data), upright)


def test_broken_exif_does_not_spoil_the_picture(caplog):
    assert np.array_equal(load_image(encoded(photo(), exif=b"garbage"), name="phone.png"), photo())
    assert "phone.png: the EXIF data is damaged" in caplog.text


def test_transparency_is_laid_over_white():
    rgba = Image.new("RGBA", (16, 16), (200, 0, 0, 0))  # red hides under full transparency
    assert load_image(encoded(rgba)).getpixel((3, 3)) == (255, 255, 255)
    assert load_image(Image.new("LA", (16, 16), (0, 128))).getpixel((3, 3)) == (127, 127, 127)
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert load_image(encoded(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert load_image(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    keyed = Image.new("RGB", (16, 16), (1, 2, 3))
    assert load_image(encoded(keyed, transparency=(1, 2, 3))).getpixel((0, 0)) == (255, 255, 255)


def test_deep_greys_are_scaled_not_clipped():
    deep = np.full((16, 16), 0x8080, np.uint16)
    deep[0] = 65535
    for data in (encoded(Image.fromarray(deep)), encoded(Image.fromarray(deep), "TIFF")):
        loaded = load_image(data)
        assert loaded.getpixel((0, 0)) == (255,) * 3
        assert loaded.getpixel((0, 5)) == (128,) * 3
    assert load_image(Image.fromarray(deep.astype(np.int32))).getpixel((0, 5)) == (128,) * 3
    assert load_image(Image.fromarray(np.full((16, 16), 0.5, np.float32))).getpixel((0, 0)) == (128,) * 3
    assert load_image(Image.fromarray(np.full((16, 16), 100.0, np.float32))).getpixel((0, 0)) == (100,) * 3
    for bad in (np.nan, -1.0, 1e6):
        with pytest.raises(ImageError, match="expected 0 to"):
            load_image(Image.fromarray(np.full((16, 16), bad, np.float32)))


def test_other_modes():
    assert load_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    assert load_image(encoded(Image.new("1", (16, 16), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.full((16, 16, 1), 7, np.uint8)).getpixel((0, 0)) == (7, 7, 7)
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(animation).getpixel((0, 0)) == (255, 0, 0)


def test_damaged_files_are_named(tmp_path):
    data = encoded(photo(200, 200))
    cases = {
        "cut.png": data[: len(data) // 2],
        "cut.jpg": encoded(photo(200, 200), "JPEG")[:2000],
        "text.png": b"<html>404</html>",
        "empty.png": b"",
        "flipped.png": data[:200] + bytes(b ^ 0xFF for b in data[200:400]) + data[400:],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="gone.png: no such file"):
        load_image("gone.png")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="dev.3.: there is no picture"):
        load_image({"path": None, "bytes": None}, name="dev[3]")
    with pytest.raises(ImageError, match="from int"):
        load_image(3)


def test_absurd_sizes_are_refused_before_decoding(monkeypatch):
    def header_only(width, height):
        chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return head + struct.pack(">I", 64) + b"IDAT" + b"\0" * 68

    with pytest.raises(ImageError, match="pixels"):
        load_image(header_only(100_000, 100_000))
    with pytest.raises(ImageError, match="too small"):
        load_image(header_only(3, 400))
    with pytest.raises(ImageError, match="long and thin"):
        load_image(header_only(20_000, 10))
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="40x30"):
        load_image(photo())


@pytest.mark.parametrize("array", [np.zeros((0, 4, 3), np.uint8), np.zeros((9, 9), np.float32), np.zeros(9, np.uint8)])
def test_arrays_that_are_no_pictures(array):
    with pytest.raises(ImageError, match="expected uint8"):
        load_image(array)


def test_postscript_is_never_run():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="PostScript"):
        load_image(script)


def test_masks():
    white = np.zeros((16, 16), np.uint8)
    white[4:8] = 255
    assert np.array_equal(load_mask(encoded(Image.fromarray(white))), white)
    assert np.array_equal(load_mask(Image.fromarray(white).convert("RGBA")), white)
    holes = photo(16, 16).convert("RGBA")
    holes.putalpha(Image.fromarray(255 - white))
    assert np.array_equal(load_mask(encoded(holes)), white)
    assert load_mask(photo(16, 16)) is None


# Geometry


@pytest.mark.golden
def test_pixels_equal_the_reference(golden, expected, name):
    wanted = expected[f"{name}.pixel_values"]
    picture = load_image(golden / "images" / f"{name}.png")
    square = Letterbox(*picture.size, wanted.shape[-1]).fit(picture)
    assert torch.equal(to_pixel_values(square), wanted[None])
    assert torch.equal(to_pixel_values([square, square])[1], wanted)


def test_square_of_model_size_is_left_alone():
    picture = photo(96, 96)
    box = Letterbox(96, 96, 96)
    assert np.array_equal(box.fit(picture), picture)
    assert np.array_equal(box.unfit(picture), picture)
    assert np.array_equal(box.unfit_grid(np.eye(6, dtype=bool)), np.kron(np.eye(6), np.ones((16, 16))).astype(bool))


def test_known_geometry():
    box = Letterbox(500, 333, 384)
    assert (box.inner_width, box.inner_height, box.left, box.top) == (384, 255, 0, 64)
    assert Letterbox(1000, 10, 384).inner_height == 14
    content = Letterbox(200, 100, 384).content(24)  # rows 96 to 288 of 384
    assert content[6:18].all() and content.sum() == 12 * 24


def test_wrong_pictures_are_refused():
    box = Letterbox(40, 30, 96)
    for wrong in (photo(30, 40), photo().convert("L")):
        with pytest.raises(ValueError, match="expected RGB"):
            box.fit(wrong)
    with pytest.raises(ValueError, match="expected RGB"):
        box.unfit(photo(95, 96))
    with pytest.raises(ValueError, match="mask"):
        box.fit_mask(Image.new("L", (30, 40)), 6)
    with pytest.raises(ValueError, match="grid"):
        box.unfit_grid(np.zeros((6, 5), bool))
    with pytest.raises(ValueError, match="at least"):
        Letterbox(0, 5, 96)
    with pytest.raises(ValueError, match="one size"):
        to_pixel_values([photo(96, 96), photo(95, 95)])


boxes = st.builds(
    lambda w, h, patches, grid: (Letterbox(w, h, patches * grid), grid),
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([8, 16]),
    st.integers(2, 24),
)


@given(boxes, st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_letterbox_invariants(box_and_grid, seed):
    box, grid = box_and_grid
    shape = (box.height, box.width)
    for patches, length, start, inner in zip(
        box.patch_of_pixels(grid), shape, (box.top, box.left), (box.inner_height, box.inner_width)
    ):
        assert patches.shape == (length,)
        assert (np.diff(patches) >= 0).all() and patches[0] >= 0 and patches[-1] < grid
        centres = start + (np.arange(length) + 0.5) * inner / length
        assert np.abs(patches + 0.5 - centres * grid / box.size).max() <= 0.5 + 1e-9
    content = box.content(grid)
    assert box.unfit_grid(np.ones((grid, grid), bool)).all()
    assert box.unfit_grid(content).all()
    assert np.array_equal(box.fit_mask(Image.new("L", (box.width, box.height), 255), grid), content)
    assert not box.fit_mask(Image.new("L", (box.width, box.height), 127), grid).any()
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 2 / (box.width * box.height)
    pooled = box.fit_mask(Image.fromarray(np.uint8(mask) * 255), grid)
    assert (box.unfit_grid(pooled) | ~mask).all()  # nothing edited is lost
    assert not (pooled & ~content).any()
    if max(shape) < 300:
        picture = photo(box.width, box.height)
        square = box.fit(picture)
        assert square.size == (box.size, box.size) and box.unfit(square).size == picture.size
        padding = np.ones((box.size, box.size), bool)
        padding[box.top : box.top + box.inner_height, box.left : box.left + box.inner_width] = False
        assert (np.asarray(square)[padding] == 127).all()


def test_fit_mask_marks_every_touched_patch_of_an_enlarged_source():
    box = Letterbox(10, 10, 384)  # fewer pixels than the 24 patches
    assert box.fit_mask(Image.new("L", (10, 10), 255), 24).all()


def test_to_image_truncates():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 2, 3).expand(3, 2, 3)
    assert np.asarray(to_image(pixels))[..., 0].ravel().tolist() == [0, 0, 127, 254, 255, 255]
    assert to_image(pixels.to(torch.bfloat16)).size == (3, 2)
    with pytest.raises(ValueError, match="NaN"):
        to_image(torch.full((3, 4, 4), float("nan")))
    with pytest.raises(ValueError, match="expected"):
        to_image(torch.zeros(1, 3, 4, 4))
    square = photo(96, 96)
    off = np.abs(np.asarray(to_image(to_pixel_values(square)[0])).astype(int) - np.asarray(square))
    assert off.max() <= 1


# The middle of a picture

ADM = GOLDEN_ROOT / "focusdiff_tiny"


@pytest.fixture(scope="module")
def crops():
    if not ADM.is_dir():
        pytest.skip(f"{GOLDEN_ROOT} has no such set")
    return {key[4:]: value for key, value in load_file(ADM / "expected.safetensors").items() if key.startswith("adm.")}


def pattern(width, height):
    y, x, channel = np.mgrid[:height, :width, :3]
    return Image.fromarray(np.uint8((3 * y + 5 * x + 60 * channel) % 256))


@pytest.mark.golden
def test_the_middle_is_that_of_the_original(crops, sizes):
    names = [key.split(".")[0] for key in crops if key.startswith("pattern_")]
    assert names
    for name in names:
        cropped = center_crop(pattern(*map(int, name.removeprefix("pattern_").split("x"))), sizes.side)
        assert np.array_equal(cropped, crops[f"{name}.crop_uint8"]), name


@pytest.mark.golden
def test_the_middle_of_photos_and_its_pixels_are_those_of_the_original(crops, golden, name, sizes):
    cropped = center_crop(load_image(golden / "images" / f"{name}.png"), sizes.side)
    assert np.array_equal(cropped, crops[f"{name}.crop_uint8"])
    torch.testing.assert_close(to_pixel_values(cropped)[0], crops[f"{name}.pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.golden
def test_the_codes_of_the_middle_are_those_of_the_original(crops, golden, name, sizes):
    checkpoint = load_checkpoint(str(golden / "checkpoint"))
    cropped = center_crop(load_image(golden / "images" / f"{name}.png"), sizes.side)
    codes = checkpoint.token_model.encode(checkpoint.processor.pixel_values([cropped]))
    assert torch.equal(codes[0].long(), crops[f"{name}.image_ids"].long())


@pytest.mark.parametrize("size", [(64, 64), (63, 200), (128, 128), (1000, 129), (20, 10)])
def test_the_middle_is_a_square_around_the_centre(size):
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :, 0] = pixels[height // 2 :, :, 1] = 255
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 64)).astype(int)
    assert cropped.shape == (64, 64, 3)
    assert abs((cropped[..., 0] > 127).mean() - 0.5) < 0.06 and abs((cropped[..., 1] > 127).mean() - 0.5) < 0.06
