"""Result folders: the original model's published numbers, and every file that can be missing or wrong."""

import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thinkclearly.evaluation.folder import evaluate_folder

ORIGINAL = Path(__file__).parent / "fixtures" / "original_results"
# The column "these files" of fixtures/original_results/README.md, as printed there: MSE and PSNR against the input.
PUBLISHED = {
    ("example1", "raw_model"): ("139.4", "26.69"),
    ("example1", "pixel_composite"): ("51.8", "30.98"),
    ("example2", "raw_model"): ("5214.1", "10.96"),
    ("example2", "pixel_composite"): ("5130.1", "11.03"),
    ("example3", "raw_model"): ("400.9", "22.10"),
    ("example3", "pixel_composite"): ("319.5", "23.09"),
}


def save(folder, name, pixels):
    Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def folder(tmp_path):
    """A 32 x 24 source, a raw model output that is 4 levels off everywhere, and an exact composite."""
    source = np.random.default_rng(0).integers(0, 200, (24, 32, 3), dtype=np.uint8)
    save(tmp_path, "input_image.png", source)
    save(tmp_path, "raw_model.png", source + 4)
    edited = np.zeros((24, 32), bool)
    edited[8:16, 8:16] = True
    save(tmp_path, "pixel_composite.png", np.where(edited[..., None], source + 4, source).astype(np.uint8))
    return tmp_path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original") / "results"
    shutil.copytree(ORIGINAL, directory)
    return directory, evaluate_folder(directory)


@pytest.mark.parametrize(("example", "name"), PUBLISHED)
def test_original_readme_numbers(original, example, name):
    metrics = original[1]["pictures"][example]["source"][name]
    assert (f"{metrics['mse']:.1f}", f"{metrics['psnr']:.2f}") == PUBLISHED[example, name]


def test_original_tokenizer_loss_and_exact_shares(original):
    pictures = original[1]["pictures"]
    decoded = pictures["example1"]["source"]["input_decoded"]
    assert (f"{decoded['mse']:.1f}", f"{decoded['psnr']:.1f}") == ("39.2", "32.2")
    shares = [f"{pictures[f'example{i}']['source']['pixel_composite']['exact']:.3f}" for i in (1, 2, 3)]
    assert shares == ["0.759", "0.001", "0.531"]


def test_original_raw_is_its_token_composite(original):
    example = original[1]["pictures"]["example3"]["source"]
    assert example["raw_model"] == example["token_composite"]


def test_summary_and_files(original):
    directory, result = original
    summary = result["summary"]["source"]
    assert summary["raw_model"]["pictures"] == 3
    assert summary["input_decoded"]["pictures"] == 1
    assert summary["copy_source"]["psnr_pooled"] == math.inf
    mean = (139.43 + 5214.11 + 400.94) / 3
    assert summary["raw_model"]["mse"] == pytest.approx(mean, abs=0.01)
    assert summary["raw_model"]["psnr_pooled"] == pytest.approx(10 * math.log10(65025 / mean), abs=0.001)
    heat = Image.open(directory / "example1" / "pixel_composite_vs_input_heatmap.png")
    pixels = np.asarray(heat)[:384, :384]
    assert (pixels == 0).all(-1).mean() == pytest.approx(0.759, abs=0.001)  # black exactly where bit-identical
    assert not list(directory.rglob("*.tmp"))


def test_metrics_json_is_strict_and_complete(original):
    directory, result = original

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((directory / "metrics.json").read_text(), parse_constant=refuse)
    assert read["pictures"].keys() == result["pictures"].keys()
    assert float(read["summary"]["source"]["copy_source"]["psnr"]) == math.inf
    assert read["summary"]["source"]["raw_model"] == result["summary"]["source"]["raw_model"]


def test_table_is_logged_with_a_copy_row(folder, caplog):
    with caplog.at_level(logging.INFO):
        result = evaluate_folder(folder)
    assert result["table"] in caplog.text
    lines = result["table"].splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "",
        "---",
        "raw",
        "pixel composite",
        "copy the source",
    ]
    assert "| copy the source | 1 | 0.0 | ∞ | ∞ | 1.0000 | 0 | 100.00 % |" in lines
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_single_folder(folder):
    result = evaluate_folder(folder)
    (metrics,) = result["pictures"].values()
    assert metrics["region"] is None
    assert metrics["source"]["raw_model"]["mse"] == 16
    assert metrics["source"]["pixel_composite"]["exact"] == 1 - 64 / 768
    assert (folder / "raw_model_vs_input_heatmap.png").is_file()
    assert not (folder / "copy_source_vs_input_heatmap.png").exists()


def test_running_twice_changes_nothing(folder):
    assert evaluate_folder(folder) == evaluate_folder(folder)


def test_source_png_is_accepted(folder):
    (folder / "input_image.png").rename(folder / "source.png")
    assert evaluate_folder(folder)["summary"]["source"]["raw_model"]["mse"] == 16


def test_human_mask_splits_and_scores_the_clear_mask(folder):
    mask = np.zeros((24, 32), np.uint8)
    mask[8:16, 8:16] = 255
    save(folder, "mask.png", mask)
    clear = np.full((24, 32), 255, np.uint8)
    clear[8:16, 8:24] = 0
    save(folder, "clear_mask.png", clear)
    result = evaluate_folder(folder)
    (metrics,) = result["pictures"].values()
    assert metrics["region"] == "mask.png"
    composite = metrics["source"]["pixel_composite"]
    assert (composite["exact_outside"], composite["exact_inside"], composite["mse_inside"]) == (1, 0, 16)
    assert metrics["clear_pixels"]["edit_iou"] == 0.5
    assert metrics["clear_pixels"]["precision"] == 1
    assert result["summary"]["clear_pixels"]["recall"] == pytest.approx((768 - 128) / (768 - 64))
    assert "outside the edit" in result["table"] and "CLEAR decisions" in result["table"]


def test_without_a_human_mask_the_models_own_mask_splits(folder):
    clear = np.full((24, 32), 255, np.uint8)
    clear[8:16, 8:16] = 0
    save(folder, "clear_mask.png", clear)
    (metrics,) = evaluate_folder(folder)["pictures"].values()
    assert metrics["region"] == "clear_mask.png"
    assert metrics["source"]["pixel_composite"]["exact_outside"] == 1
    assert metrics["source"]["pixel_composite"]["pixels_inside"] == 64
    assert "clear_pixels" not in metrics


def test_target_is_compared_too(folder):
    shutil.copy(folder / "pixel_composite.png", folder / "target.png")
    (metrics,) = evaluate_folder(folder)["pictures"].values()
    assert metrics["target"]["pixel_composite"]["psnr"] == math.inf
    assert metrics["target"]["copy_source"]["mse"] == pytest.approx(16 * 64 / 768)


def test_token_lists(folder):
    record = {"clear": [[1, 1], [0, 0]], "source_tokens": [1, 2, 3, 4], "target_tokens": [1, 7, 8, 4]}
    (folder / "result.json").write_text(json.dumps(record))
    result = evaluate_folder(folder)
    clear = result["summary"]["clear_tokens"]
    assert (clear["clear_both"], clear["clear_predicted"], clear["clear_true"], clear["positions"]) == (1, 2, 2, 4)
    (folder / "result.json").write_text(json.dumps({"clear": [[1]], "source_tokens": [1]}))
    assert "clear_tokens" not in evaluate_folder(folder)["summary"]


def break_size(folder):
    save(folder, "raw_model.png", np.zeros((16, 16, 3), np.uint8))


def break_mask_size(folder):
    save(folder, "clear_mask.png", np.zeros((12, 12), np.uint8))


def break_mask_colour(folder):
    save(folder, "mask.png", np.full((24, 32, 3), (255, 0, 0), np.uint8))


def break_file(folder):
    (folder / "pixel_composite.png").write_bytes((folder / "pixel_composite.png").read_bytes()[:200])


def break_json(folder):
    (folder / "result.json").write_text("{")


def break_tokens(folder):
    (folder / "result.json").write_text('{"clear": [[1, 0]], "source_tokens": [1], "target_tokens": [2]}')


def drop_predictions(folder):
    (folder / "raw_model.png").unlink()
    (folder / "pixel_composite.png").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_size, "raw_model.png is 16x16 but input_image.png is 32x24"),
        (break_mask_size, "clear_mask.png is 12x12"),
        (break_mask_colour, "mask.png is a colour picture"),
        (break_file, "pixel_composite.png: cannot be read"),
        (break_json, "result.json is not JSON"),
        (break_tokens, "result.json: .* do not fit together .*2 predicted positions but 1"),
        (drop_predictions, "nothing to compare"),
    ],
)
def test_errors_name_the_file(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        evaluate_folder(folder)
    assert not (folder / "metrics.json").exists()


def test_missing_source_and_missing_folders(folder, tmp_path):
    (folder / "input_image.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no source; expected input_image.png or source.png"):
        evaluate_folder(folder)
    (tmp_path / "empty" / "cache").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="hold none of"):
        evaluate_folder(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        evaluate_folder(tmp_path / "nowhere")
