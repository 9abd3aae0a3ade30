import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from thinkclearly.data import sources
from thinkclearly.data.inspect import MEANING, inspect_dataset
from thinkclearly.data.jsonl import read_jsonl, write_jsonl
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.models.janus.model import Janus
from thinkclearly.models.load import load_checkpoint

K, N = 128, 36
FILES = ("statistics.json", "statistics.png", "examples.png")


@pytest.fixture(scope="module")
def checkpoint(golden):
    return load_checkpoint(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        return prepare_dataset(sources.shapes(6, 48, seed=3), checkpoint, tmp_path_factory.mktemp("prepared"))


def table(source, target, difference, masks, clear):
    """A labelled data set without pictures; arrays are (records, N)."""
    count = len(source)
    return Dataset.from_dict(
        {
            "key": [f"data[{i}]" for i in range(count)],
            "instruction": ["Costs $5 and $6"] * count,
            "input_tokens": source,
            "target_tokens": target,
            "pixel_difference": difference,
            "mask_tokens": masks,
            "output_tokens": np.where(clear, K, target),
        }
    )


@pytest.fixture
def known(monkeypatch):
    """Two masked records and one without, whose numbers can be counted on fingers."""
    source = np.zeros((3, N), int)
    target, difference, mask = source.copy(), source.copy(), np.zeros((3, N), bool)
    mask[0, :9] = True  # a quarter edited: codes and pixels agree with the mask
    target[0, :9], difference[0, :9] = 1, 200
    mask[1, :18] = True
    target[1, 9:27] = 1  # 9 of the mask's 18, 9 outside it
    difference[1, :18], difference[1, 18:20], difference[1, 20:22] = 100, 50, 5
    return table(source, target, difference, [mask[0], mask[1], None], clear=target == 0)


def test_known_numbers(known, checkpoint, tmp_path):
    found = inspect_dataset(known, checkpoint, tmp_path)
    assert (found["records"], found["patches"], found["pixel_tolerance"]) == (3, N, 16)
    ratio = found["clear_ratio"]
    assert ratio["labels"] == ratio["tokens"]
    assert ratio["tokens"]["mean"] == pytest.approx((0.75 + 0.5 + 1) / 3) and ratio["tokens"]["q50"] == 0.75
    assert ratio["pixels"]["mean"] == pytest.approx((0.75 + 16 / 36 + 1) / 3)
    assert ratio["mask"]["mean"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["mask_coverage"]["histogram"] == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    assert found["mask_coverage"]["records"] == 2
    assert found["outside_mask"] == {
        "tokens_differ": 9 / 45,
        "tokens_differ_same_pixels": 7 / 45,
        "tokens_differ_identical_pixels": 5 / 45,
    }
    agreement = found["agreement_with_mask"]
    assert agreement["tokens"] == {"accuracy": 54 / 72, "precision": 18 / 27, "recall": 18 / 27, "iou": 18 / 36}
    assert agreement["pixels"] == {"accuracy": 70 / 72, "precision": 27 / 29, "recall": 1.0, "iou": 27 / 29}


def test_the_tolerance_counts(known, checkpoint, tmp_path):
    found = inspect_dataset(known, checkpoint, tmp_path, pixel_tolerance=60)
    assert found["outside_mask"]["tokens_differ_same_pixels"] == 9 / 45
    assert found["agreement_with_mask"]["pixels"]["precision"] == 1.0


def test_files(prepared, checkpoint, tmp_path):
    found = inspect_dataset(prepared, checkpoint, tmp_path / "new" / "folder", examples=3)
    written = json.loads((tmp_path / "new/folder/statistics.json").read_text())
    assert written == found and written["meaning"] == MEANING
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == sorted(FILES)
    sizes = [Image.open(tmp_path / "new/folder" / name).size for name in FILES[1:]]
    assert sizes[1][1] > sizes[1][0]  # three rows of three
    labels = np.asarray(prepared["output_tokens"][:])
    assert found["clear_ratio"]["labels"]["mean"] == pytest.approx((labels == K).mean())
    assert found["clear_ratio"]["labels"] == found["clear_ratio"]["pixels"] != found["clear_ratio"]["tokens"]


def test_every_statistic_has_a_meaning(known, checkpoint, tmp_path):
    found = inspect_dataset(known, checkpoint, tmp_path)
    assert set(MEANING) >= {"clear_ratio", "mask_coverage", "agreement_with_mask"}
    assert {f"outside_mask.{name}" for name in found["outside_mask"]} <= set(MEANING)


def test_examples_follow_the_seed(prepared, checkpoint, tmp_path):
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        inspect_dataset(prepared, checkpoint, tmp_path / name, examples=2, seed=seed)
        pictures.append(np.asarray(Image.open(tmp_path / name / "examples.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert pictures[0].shape != pictures[2].shape or not np.array_equal(pictures[0], pictures[2])


def test_jsonl_data(prepared, checkpoint, tmp_path):
    write_jsonl(prepared, tmp_path / "data.jsonl", K)
    dataset, _ = read_jsonl(tmp_path / "data.jsonl", K, N)
    found = inspect_dataset(dataset, checkpoint, tmp_path, examples=20)
    assert list(found["clear_ratio"]) == ["labels"]
    assert "mask_coverage" not in found and "outside_mask" not in found
    assert found["clear_ratio"]["labels"]["mean"] > 0.3
    assert all((tmp_path / name).is_file() for name in FILES)


def test_without_masks(prepared, checkpoint, tmp_path):
    nowhere = prepared.remove_columns("mask_tokens").add_column("mask_tokens", [None] * len(prepared))
    found = inspect_dataset(nowhere.cast(prepared.features), checkpoint, tmp_path)
    assert list(found["clear_ratio"]) == ["labels", "tokens", "pixels"] and "outside_mask" not in found


def test_all_edited(checkpoint, tmp_path):
    ones = np.ones((2, N), int)
    found = inspect_dataset(table(ones, ones, ones * 0, list(ones > 0), clear=ones > 0), checkpoint, tmp_path)
    assert set(found["outside_mask"].values()) == {None}  # there is no outside
    assert found["agreement_with_mask"]["tokens"] == {"accuracy": 0.0, "precision": None, "recall": 0.0, "iou": 0.0}


def test_a_selection_is_measured_as_it_is(prepared, checkpoint, tmp_path):
    part = prepared.select([4, 1])
    found = inspect_dataset(part, checkpoint, tmp_path, examples=0)
    labels = np.asarray(part["output_tokens"][:])
    assert found["records"] == 2
    assert found["clear_ratio"]["labels"]["mean"] == pytest.approx((labels == K).mean())
    assert not (tmp_path / "examples.png").exists()


def test_the_sheet_shows_the_codes(prepared, checkpoint, tmp_path, monkeypatch):
    shown = []
    decode = lambda janus, tokens: shown.append(tokens) or torch.zeros(len(tokens), 3, 96, 96)  # noqa: E731
    monkeypatch.setattr(Janus, "decode", decode)
    inspect_dataset(prepared.select([0]), checkpoint, tmp_path)
    row = prepared[0]
    assert shown[0].tolist() == [row["input_tokens"], row["target_tokens"]]
