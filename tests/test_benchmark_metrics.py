"""The benchmarks' numbers: by hand, against torchmetrics, and as their authors average and mask them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_towers import save_clip, save_dino
from torchmetrics import MeanSquaredError
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from thinkclearly.evaluation.benchmarks import metrics
from thinkclearly.evaluation.benchmarks.metrics import Item
from thinkclearly.evaluation.benchmarks.published import PUBLISHED, SOURCES
from thinkclearly.evaluation.benchmarks.report import COLUMNS
from thinkclearly.evaluation.benchmarks.towers import Clip, Dino

SIZE = 48


def plain(level, size=SIZE):
    return Image.new("RGB", (size, size), (level, level, level))


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def left_half():
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, : SIZE // 2] = True
    return mask


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return {"clip": Clip(save_clip(folder / "clip")), "dino": Dino(save_dino(folder / "dino"))}


def test_distances_by_hand():
    assert metrics.distances(plain(51), plain(0)) == pytest.approx({"l1": 0.2, "l2": 0.04})
    assert metrics.distances(plain(51, 96), plain(0)) == pytest.approx({"l1": 0.2, "l2": 0.04})  # brought to its size
    half = plain(0)
    half.paste((51, 0, 0), (0, 0, SIZE // 2, SIZE))  # half of the pixels, one of three channels
    assert metrics.distances(half, plain(0)) == pytest.approx({"l1": 0.2 / 6, "l2": 0.04 / 6})


def test_magicbrush_rows(towers):
    (rows,) = metrics.magicbrush([Item({"ours": noise(1)}, noise(2), "a dog", noise(3))], **towers)
    assert list(rows) == ["ours", "copy_source", "target"]
    assert rows["target"]["l1"] == rows["target"]["l2"] == 0
    assert rows["target"]["clip_i"] == pytest.approx(1) and rows["target"]["dino"] == pytest.approx(1)
    assert rows["copy_source"]["l1"] == metrics.distances(noise(2), noise(3))["l1"]
    clip, dino = towers["clip"], towers["dino"]
    ours, target = clip.images([noise(1), noise(3)])
    assert rows["ours"]["clip_i"] == pytest.approx((ours @ target).item(), abs=1e-6)
    assert rows["ours"]["clip_t"] == pytest.approx((ours @ clip.texts(["a dog"])[0]).item(), abs=1e-6)
    ours, target = dino.images([noise(1), noise(3)])
    assert rows["ours"]["dino"] == pytest.approx((ours @ target).item(), abs=1e-6)
    assert rows["ours"]["mse_outside"] is None  # no mask


def test_items_of_a_batch_do_not_mix(towers):
    items = [Item({"ours": noise(i)}, noise(9 - i), text, noise(20 + i)) for i, text in enumerate(["a", None, "cat"])]
    together = metrics.magicbrush(items, **towers)
    alone = [metrics.magicbrush([item], **towers)[0] for item in items]
    for rows, expected in zip(together, alone):
        for name, row in expected.items():
            assert rows[name] == pytest.approx(row, abs=1e-5)
    assert together[1]["ours"]["clip_t"] is None and together[2]["ours"]["clip_t"] is not None


def test_without_towers_there_are_pixels_only():
    (rows,) = metrics.magicbrush([Item({}, noise(1), "a", noise(2), left_half())])
    assert {key for key, value in rows["copy_source"].items() if value is None} == {"clip_i", "clip_t", "dino"}
    (rows,) = metrics.pie_bench([Item({}, noise(1), "a", mask=left_half())])
    unknown = {"structure", "clip_whole", "clip_edited", "lpips"}
    assert {key for key, value in rows["copy_source"].items() if value is None} == unknown


def test_background_agrees_with_torchmetrics_as_pnpinversion_calls_it():
    prediction, source, mask = noise(1), noise(2), left_half()
    (rows,) = metrics.pie_bench([Item({"ours": prediction}, source, "a", mask=mask)])
    shown = 1 - np.repeat(mask[..., None], 3, -1).astype(np.float32)
    pair = [torch.tensor(np.asarray(p).astype(np.float32) / 255 * shown) for p in (prediction, source)]
    pair = [pixels.permute(2, 0, 1)[None].contiguous() for pixels in pair]
    assert rows["ours"]["mse"] == pytest.approx(1e4 * MeanSquaredError()(*pair).item(), rel=1e-5)
    ssim = StructuralSimilarityIndexMeasure(data_range=1.0)(*pair).item()
    assert rows["ours"]["ssim"] == pytest.approx(1e2 * ssim, rel=1e-5)
    psnr = PeakSignalNoiseRatio(data_range=1.0)(*pair).item()
    assert metrics.summarise([rows["ours"]])["psnr"] == pytest.approx(psnr, rel=1e-5)


def test_a_large_mask_flatters_pie_bench_and_not_gie_bench():
    small, large = left_half(), np.ones((SIZE, SIZE), bool)
    large[:, -1] = False
    rows = [metrics.pie_bench([Item({"ours": plain(51)}, plain(0), "a", mask=m)])[0]["ours"] for m in (small, large)]
    assert [row["mse"] for row in rows] == pytest.approx([400 / 2, 400 / SIZE])  # 0.2² · 10⁴ · share unedited
    assert [row["mse_outside"] for row in rows] == [51**2, 51**2]


def test_inside_the_mask_nothing_counts_as_background():
    changed = noise(2)
    changed.paste("red", (0, 0, SIZE // 2, SIZE))
    (rows,) = metrics.pie_bench([Item({"ours": changed}, noise(2), "a", mask=left_half())])
    assert rows["ours"]["mse"] == 0 and rows["ours"]["ssim"] == pytest.approx(100)
    assert rows["ours"]["exact_outside"] == 1 and rows["ours"]["mse_outside"] == 0


def test_nothing_unedited_is_no_number_and_in_no_mean():
    everything = np.ones((SIZE, SIZE), bool)
    items = [Item({"ours": plain(51)}, plain(0), "a", mask=mask) for mask in (everything, left_half())]
    first, second = (rows["ours"] for rows in metrics.pie_bench(items))
    assert first["mse"] is first["ssim"] is first["mse_outside"] is first["exact_outside"] is None
    summary = metrics.summarise([first, second])
    assert summary["pictures"] == 2 and summary["mse"] == second["mse"] and summary["psnr"] == summary["psnr_pooled"]
    assert metrics.summarise([first])["psnr"] is None


def test_one_exact_copy_makes_the_mean_psnr_infinite_and_not_the_pooled_one():
    items = [Item({"ours": plain(level)}, plain(0), "a", mask=left_half()) for level in (0, 51)]
    summary = metrics.summarise([rows["ours"] for rows in metrics.pie_bench(items)])
    assert summary["mse"] == pytest.approx(100)
    assert summary["psnr"] == math.inf and summary["psnr_pooled"] == pytest.approx(20)


def test_the_mean_psnr_is_over_pictures():
    items = [Item({"ours": plain(level)}, plain(0), "a", mask=left_half()) for level in (51, 255)]
    summary = metrics.summarise([rows["ours"] for rows in metrics.pie_bench(items)])
    single = [10 * math.log10(1 / (share / 2)) for share in (0.04, 1)]
    assert summary["psnr"] == pytest.approx(sum(single) / 2)


def test_pie_bench_towers(towers):
    inside, outside = noise(2), noise(2)
    inside.paste("red", (0, 0, SIZE // 2, SIZE))
    outside.paste("red", (SIZE // 2, 0, SIZE, SIZE))
    like, unlike = (
        Item({"inside": inside, "outside": outside}, noise(2), words, mask=left_half()) for words in ("a dog", "ice")
    )
    rows, others = metrics.pie_bench([like, unlike], **towers)
    assert rows["copy_source"]["structure"] == 0 and rows["inside"]["structure"] > 0
    maps = towers["dino"].structure([inside, noise(2)])
    assert rows["inside"]["structure"] == pytest.approx(1e3 * (maps[0] - maps[1]).square().mean().item())
    for name, picture in {"inside": inside, "outside": outside, "copy_source": noise(2)}.items():
        cosines = towers["clip"].images([picture]) @ towers["clip"].texts(["a dog", "ice"]).T
        assert cosines[0, 0] > 0 > cosines[0, 1]
        assert rows[name]["clip_whole"] == pytest.approx(100 * cosines[0, 0].item(), abs=1e-3)
        assert others[name]["clip_whole"] == 0
    assert rows["outside"]["clip_edited"] == rows["copy_source"]["clip_edited"]  # the other half is black
    assert rows["outside"]["clip_whole"] != rows["copy_source"]["clip_whole"]


def test_lpips_gets_zeroed_pictures_on_minus_one_to_one():
    def distance(prediction, reference):
        assert prediction.shape == reference.shape == (1, 3, SIZE, SIZE)
        assert prediction[..., : SIZE // 2].unique().tolist() == [-1]
        return (prediction - reference).abs().max()

    (rows,) = metrics.pie_bench([Item({"ours": plain(255)}, plain(0), "a", mask=left_half())], lpips=distance)
    assert rows["ours"]["lpips"] == 2000 and rows["copy_source"]["lpips"] == 0


def test_pictures_must_have_the_masks_size():
    with pytest.raises(ValueError, match="expected one size"):
        metrics.pie_bench([Item({"ours": plain(0, 96)}, plain(0), "a", mask=left_half())])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_have_sources_and_our_columns(name):
    for rows in PUBLISHED[name].values():
        for _, source, values in rows:
            assert source in SOURCES
            assert values.keys() <= COLUMNS[name].keys()


@pytest.mark.parametrize(("name", "rows"), [("magicbrush", 8), ("pie-bench", 7)])
def test_the_docs_tables_are_the_published_ones(name, rows):
    lines = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8").splitlines()
    told = {cells[1].strip(): cells[2:-2] for cells in (line.split("|") for line in lines) if len(cells) > 9}
    found = 0
    for method in dict.fromkeys(row[0] for setting in PUBLISHED[name].values() for row in setting):
        if method in told:
            values = [row[2] for setting in PUBLISHED[name].values() for row in setting if row[0] == method]
            columns = {"magicbrush": ("l1", "l2", "clip_i", "dino", "clip_t")}.get(name, tuple(values[0]))
            numbers = [row.get(column) for row in values for column in columns]
            assert [None if "–" in cell else float(cell) for cell in told[method]] == numbers
            found += 1
    assert found == rows
