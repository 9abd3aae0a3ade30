"""Image and CLEAR metrics against hand-computed cases, scikit-image, scikit-learn and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from thinkclearly.evaluation.hf_metrics import ClearMaskMetric, EditImageMetric
from thinkclearly.evaluation.metrics import (
    aggregate_clear_metrics,
    aggregate_image_metrics,
    clear_metrics,
    image_metrics,
)


def noise(seed, size=(32, 40)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def smooth(seed, size=(48, 64)):
    """Something photograph-like: blurred noise, and a slightly different copy."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    picture = np.array(small.resize(size[::-1], Image.Resampling.BICUBIC))
    return picture, np.clip(picture + rng.integers(-9, 10, picture.shape), 0, 255).astype(np.uint8)


def half_mask(shape):
    mask = np.zeros(shape[:2], bool)
    mask[:, : shape[1] // 2] = True
    return mask


def test_hand_computed_case():
    reference = np.zeros((2, 2, 3), np.uint8)
    prediction = reference.copy()
    prediction[0, 0] = (3, 0, 0)
    prediction[1, 1] = (0, 4, 2)
    mask = np.array([[True, True], [False, False]])
    metrics = image_metrics(prediction, reference, mask)
    assert metrics["mse"] == (9 + 16 + 4) / 12
    assert metrics["mse_inside"] == 9 / 6
    assert metrics["mse_outside"] == 20 / 6
    assert (metrics["exact"], metrics["exact_inside"], metrics["exact_outside"]) == (0.5, 0.5, 0.5)
    assert (metrics["max_abs"], metrics["max_abs_inside"], metrics["max_abs_outside"]) == (4, 3, 4)
    assert (metrics["pixels"], metrics["pixels_inside"], metrics["pixels_outside"]) == (4, 2, 2)
    assert metrics["psnr_inside"] == pytest.approx(10 * math.log10(65025 / 1.5))
    assert metrics["ssim"] is None  # no window fits


def test_a_pixel_is_exact_only_if_all_channels_agree():
    reference = np.full((1, 3, 3), 100, np.uint8)
    prediction = reference.copy()
    prediction[0, 0, 2] = 101
    assert image_metrics(prediction, reference)["exact"] == 2 / 3


def test_differences_do_not_wrap_around():
    black, white = np.zeros((12, 12, 3), np.uint8), np.full((12, 12, 3), 255, np.uint8)
    for pair in ((black, white), (white, black)):
        metrics = image_metrics(*pair)
        assert (metrics["mse"], metrics["psnr"], metrics["max_abs"], metrics["exact"]) == (65025, 0, 255, 0)


def test_exact_copy():
    picture, _ = smooth(0)
    metrics = image_metrics(picture, picture, half_mask(picture.shape))
    for suffix in ("", "_inside", "_outside"):
        assert metrics[f"mse{suffix}"] == 0
        assert metrics[f"psnr{suffix}"] == math.inf
        assert metrics[f"ssim{suffix}"] == 1
        assert metrics[f"exact{suffix}"] == 1
        assert metrics[f"max_abs{suffix}"] == 0


@pytest.mark.parametrize("pair", [smooth(1), (noise(2), noise(3))])
def test_whole_picture_agrees_with_libraries(pair):
    metrics = image_metrics(*pair)
    a, b = (torch.from_numpy(picture).permute(2, 0, 1)[None].double() for picture in pair)
    assert metrics["psnr"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255.0).item(), abs=1e-4)
    reference = structural_similarity(
        *pair, data_range=255, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False
    )
    assert metrics["ssim"] == pytest.approx(reference, abs=1e-12)
    _, full = structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    assert metrics["ssim"] == pytest.approx(full[..., 5:-5, 5:-5].mean().item(), abs=1e-6)


def test_region_ssim_is_the_mean_of_torchmetrics_map_over_the_region():
    pair = smooth(4)
    mask = half_mask(pair[0].shape)
    metrics = image_metrics(*pair, mask)
    a, b = (torch.from_numpy(picture).permute(2, 0, 1)[None].double() for picture in pair)
    _, full = structural_similarity_index_measure(a, b, data_range=255.0, return_full_image=True)
    full = full[0].mean(0).numpy()
    inner = np.zeros_like(mask)
    inner[5:-5, 5:-5] = True
    assert metrics["ssim_inside"] == pytest.approx(full[mask & inner].mean(), abs=1e-6)
    assert metrics["ssim_outside"] == pytest.approx(full[~mask & inner].mean(), abs=1e-6)


def test_masked_mse_is_normalised_by_the_region_and_parts_add_up():
    a, b = noise(5), noise(6)
    mask = np.random.default_rng(7).random(a.shape[:2]) < 0.1
    metrics = image_metrics(a, b, mask)
    inside = ((a[mask].astype(float) - b[mask]) ** 2).mean()
    assert metrics["mse_inside"] == pytest.approx(inside)
    total = metrics["mse_inside"] * metrics["pixels_inside"] + metrics["mse_outside"] * metrics["pixels_outside"]
    assert metrics["mse"] * metrics["pixels"] == pytest.approx(total)


def test_edit_confined_to_the_mask_leaves_the_outside_exact():
    source, edited = smooth(8)
    mask = half_mask(source.shape)
    composite = np.where(mask[..., None], edited, source)
    metrics = image_metrics(composite, source, mask)
    assert (metrics["exact_outside"], metrics["max_abs_outside"], metrics["psnr_outside"]) == (1, 0, math.inf)
    assert metrics["ssim_outside"] < 1  # windows across the border, as documented
    assert metrics["exact_inside"] < 1


def test_empty_regions_are_none():
    a, b = smooth(9)
    metrics = image_metrics(a, b, np.zeros(a.shape[:2], bool))
    assert metrics["pixels_inside"] == 0
    assert all(metrics[f"{name}_inside"] is None for name in ("mse", "psnr", "ssim", "max_abs", "exact"))
    assert all(metrics[f"{name}_outside"] == metrics[name] for name in ("mse", "psnr", "ssim", "max_abs", "exact"))


def test_pil_pictures_are_compared_as_rgb():
    grey = Image.fromarray(noise(10)[..., 0])
    assert image_metrics(grey, grey.convert("RGB"))["mse"] == 0


@pytest.mark.parametrize(
    ("prediction", "mask", "message"),
    [
        (np.zeros((4, 5, 3), np.uint8), None, "5x4 .* 4x4"),
        (np.zeros((4, 4), np.uint8), None, "expected uint8"),
        (np.zeros((4, 4, 3), np.float32), None, "float32"),
        (np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.uint8), "mask is uint8"),
        (np.zeros((4, 4, 3), np.uint8), np.ones((2, 2), bool), r"mask is bool \(2, 2\)"),
    ],
)
def test_bad_input_is_named(prediction, mask, message):
    with pytest.raises(ValueError, match=message):
        image_metrics(prediction, np.zeros((4, 4, 3), np.uint8), mask)


def test_pooled_psnr_survives_an_exact_copy():
    reference = np.zeros((12, 12, 3), np.uint8)
    large = np.zeros((24, 24, 3), np.uint8)
    rows = [image_metrics(reference, reference), image_metrics(large + 5, large)]
    result = aggregate_image_metrics(rows)
    assert result["pictures"] == 2
    assert result["mse"] == 12.5
    assert result["psnr"] == math.inf
    assert result["mse_pooled"] == pytest.approx(25 * 576 / (576 + 144))  # weighted by pixels: 20, not 12.5
    assert result["psnr_pooled"] == pytest.approx(10 * math.log10(65025 / 20))
    assert result["exact"] == 0.5
    assert result["max_abs"] == 5


def test_aggregate_leaves_empty_regions_out():
    a, b = smooth(11)
    with_edit = image_metrics(a, b, half_mask(a.shape))
    without = image_metrics(a, b, np.zeros(a.shape[:2], bool))
    result = aggregate_image_metrics([with_edit, without])
    assert result["mse_inside"] == with_edit["mse_inside"]
    assert result["mse_pooled_inside"] == pytest.approx(with_edit["mse_inside"])
    assert aggregate_image_metrics([without])["psnr_pooled_inside"] is None
    assert "mse_inside" not in aggregate_image_metrics([image_metrics(a, b)])
    with pytest.raises(ValueError, match="at least one"):
        aggregate_image_metrics([])


def test_clear_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(12)
    predicted, true = rng.random(576) < 0.8, rng.random(576) < 0.7
    metrics = clear_metrics(predicted, true)
    assert metrics["precision"] == pytest.approx(precision_score(true, predicted))
    assert metrics["recall"] == pytest.approx(recall_score(true, predicted))
    assert metrics["f1"] == pytest.approx(f1_score(true, predicted))
    assert metrics["edit_iou"] == pytest.approx(jaccard_score(~true, ~predicted))
    assert metrics["clear_rate_predicted"] == predicted.mean()
    assert metrics["clear_rate_true"] == true.mean()


def test_clear_metrics_by_hand():
    predicted = np.array([True, True, True, False])
    true = np.array([True, True, False, False])
    metrics = clear_metrics(predicted, true)
    assert (metrics["precision"], metrics["recall"], metrics["f1"], metrics["edit_iou"]) == (2 / 3, 1, 0.8, 0.5)


def test_ratios_without_a_denominator_are_none():
    everything, nothing = np.ones(9, bool), np.zeros(9, bool)
    assert clear_metrics(everything, everything)["edit_iou"] is None
    metrics = clear_metrics(nothing, nothing)
    assert (metrics["precision"], metrics["recall"], metrics["f1"], metrics["edit_iou"]) == (None, None, None, 1)


def test_clear_aggregate_pools_positions_not_ratios():
    rng = np.random.default_rng(13)
    pairs = [(rng.random(n) < p, rng.random(n) < q) for n, p, q in ((16, 0.1, 0.9), (400, 0.9, 0.8))]
    pooled = aggregate_clear_metrics([clear_metrics(*pair) for pair in pairs])
    joined = clear_metrics(*(np.concatenate(masks) for masks in zip(*pairs)))
    assert pooled == {"pictures": 2} | joined


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (np.ones(4, bool), np.ones(5, bool), "4 predicted positions but 5"),
        (np.ones(4, np.int64), np.ones(4, bool), "predicted CLEAR mask is int64"),
        (np.ones(4, bool), np.ones((2, 2), bool), r"true CLEAR mask is bool \(2, 2\)"),
    ],
)
def test_bad_clear_masks_are_named(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        clear_metrics(predicted, true)


def test_edit_image_metric_collects_batches(tmp_path):
    a, b = smooth(14)
    c, d = noise(15), noise(16)
    metric = EditImageMetric(cache_dir=str(tmp_path))
    for _ in range(2):  # usable again after compute
        metric.add_batch(predictions=[a], references=[b])
        metric.add_batch(predictions=[Image.fromarray(c)], references=[d])
        assert metric.compute() == aggregate_image_metrics([image_metrics(a, b), image_metrics(c, d)])


def test_edit_image_metric_with_masks(tmp_path):
    a, b = smooth(17)
    mask = half_mask(a.shape)
    expected = aggregate_image_metrics([image_metrics(a, b, mask)] * 2)
    metric = EditImageMetric("masked", cache_dir=str(tmp_path))
    masks = [mask, Image.fromarray(mask.astype(np.uint8) * 255)]
    assert metric.compute(predictions=[a, a], references=[b, b], masks=masks) == expected
    with pytest.raises(ValueError, match="no configuration 'mask'"):
        EditImageMetric("mask", cache_dir=str(tmp_path))


def test_clear_mask_metric_collects_batches_of_any_length(tmp_path):
    rng = np.random.default_rng(18)
    pairs = [(rng.random(n) < 0.8, rng.random(n) < 0.7) for n in (36, 576)]
    metric = ClearMaskMetric(cache_dir=str(tmp_path))
    for predicted, true in pairs:
        metric.add_batch(predictions=[predicted], references=[true])
    assert metric.compute() == aggregate_clear_metrics([clear_metrics(*pair) for pair in pairs])
