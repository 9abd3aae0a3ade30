"""Untouched pixels are the source's, byte for byte; the original's two-sided blend is the original's."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from thinkclearly.editing import composite as module
from thinkclearly.editing.composite import composite, smooth_mask
from thinkclearly.images import Letterbox


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def mask(grid, share, seed):
    return np.random.default_rng(seed).random((grid, grid)) < share


@given(
    st.integers(1, 260),
    st.integers(1, 260),
    st.sampled_from([(6, 96), (24, 384), (3, 48)]),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.floats(0, 30),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_clear_pixels_are_the_source_and_distant_ones_the_edit(width, height, geometry, share, radius, seed):
    grid, size = geometry
    box, clear = Letterbox(width, height, size), mask(grid, share, seed)
    source, edited = noise(width, height, seed + 1), noise(width, height, seed + 2)
    image, kept = composite(source, edited, clear, box, radius)
    result = np.asarray(image)
    pixels = box.unfit_grid(clear)
    assert np.array_equal(kept, pixels) and np.array_equal(result[kept], np.asarray(source)[kept])
    between = np.minimum(np.asarray(source), edited) <= result
    assert (between & (result <= np.maximum(np.asarray(source), edited))).all()
    # Brute force: pixels with no CLEAR pixel within the feather.
    reach = radius * max(width, height) / size + 1
    if not pixels.any():
        assert np.array_equal(result, np.asarray(edited))
    for y, x in np.random.default_rng(seed).integers(0, (height, width), (20, 2)):
        rows, columns = np.nonzero(pixels)
        if len(rows) and np.sqrt(((rows - y) ** 2 + (columns - x) ** 2).min()) >= reach:
            assert np.array_equal(result[y, x], np.asarray(edited)[y, x])


def test_radius_zero_is_a_hard_edge():
    box, clear = Letterbox(96, 64, 96), mask(6, 0.5, 0)
    source, edited = noise(96, 64, 1), noise(96, 64, 2)
    expected = np.where(box.unfit_grid(clear)[..., None], source, edited)
    assert np.array_equal(composite(source, edited, clear, box, 0.0)[0], expected)


@pytest.mark.parametrize("feather", ["inside", "two_sided"])
def test_bands_do_not_show(monkeypatch, feather):
    box, clear = Letterbox(150, 230, 96), mask(6, 0.3, 3)
    source, edited = noise(150, 230, 1), noise(150, 230, 2)
    whole = composite(source, edited, clear, box, 6.0, feather)
    monkeypatch.setattr(module, "BAND", 7)
    for found, expected in zip(composite(source, edited, clear, box, 6.0, feather), whole):
        assert np.array_equal(found, expected)


def test_the_blend_rises_away_from_clear():
    clear = np.zeros((6, 6), bool)
    clear[:, :3] = True
    black, white = Image.new("RGB", (96, 96)), Image.new("RGB", (96, 96), "white")
    row = np.asarray(composite(black, white, clear, Letterbox(96, 96, 96), 4.0)[0])[50, :, 0]
    assert row[:48].max() == 0
    assert row[48:53].tolist() == [51, 102, 153, 204, 255]
    assert row[53:].min() == 255


@pytest.mark.parametrize("seed", range(3))
def test_two_sided_is_the_originals_procedure(seed):
    clear = smooth_mask(mask(24, 0.6, seed), 3, 1)
    source, edited = noise(384, 384, seed), noise(384, 384, seed + 10)
    # 4_simple_inference.py: NEAREST to 384, blur of radius 8, alpha·source + (1 − alpha)·decoded.
    alpha = Image.fromarray(np.uint8(clear) * 255).resize((384, 384), Image.Resampling.NEAREST)
    alpha = np.asarray(alpha.filter(ImageFilter.GaussianBlur(8)), np.float64)[..., None] / 255
    expected = alpha * np.asarray(source) + (1 - alpha) * np.asarray(edited)
    image, kept = composite(source, edited, clear, Letterbox(384, 384, 384), 8.0, "two_sided")
    found = np.asarray(image, np.float64)
    assert np.array_equal(kept, alpha[..., 0] == 1) and np.array_equal(found[kept], np.asarray(source)[kept])
    assert np.abs(found - expected).max() <= 0.5 + 1e-3  # rounding to bytes


def test_an_unknown_feather_is_an_error():
    picture = Image.new("RGB", (96, 96))
    with pytest.raises(ValueError, match="feather='soft'; choose 'inside' or 'two_sided'"):
        composite(picture, picture, np.ones((6, 6), bool), Letterbox(96, 96, 96), 1.0, "soft")


@given(st.integers(1, 9), st.sampled_from([1, 3, 5]), st.integers(0, 3), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_smoothing_is_a_majority_vote(grid, ksize, passes, share, seed):
    clear = mask(grid, share, seed)
    expected = clear.copy()
    for _ in range(passes):
        padded = np.pad(expected, ksize // 2, mode="edge")
        votes = [[padded[r : r + ksize, c : c + ksize].sum() for c in range(grid)] for r in range(grid)]
        expected = np.array(votes) >= ksize**2 // 2 + 1
    found = smooth_mask(clear, ksize, passes)
    assert found.dtype == bool and np.array_equal(found, expected)


@pytest.mark.parametrize("ksize", [0, 2, -1])
def test_an_even_window_is_an_error(ksize):
    with pytest.raises(ValueError, match=f"mask_smooth_ksize={ksize}"):
        smooth_mask(np.ones((6, 6), bool), ksize, 1)


@pytest.mark.parametrize("feather", ["inside", "two_sided"])
def test_a_photograph_needs_a_few_times_its_size(feather):
    width, height = 4000, 3000
    source, edited = Image.new("RGB", (width, height), "red"), Image.new("RGB", (width, height), "blue")
    tracemalloc.start()
    result, _ = composite(source, edited, mask(24, 0.3, 0), Letterbox(width, height, 384), 2.0, feather)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.size == (width, height)
    assert peak < 10 * width * height * 3, f"{peak / 1e6:.0f} MB"
