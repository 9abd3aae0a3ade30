"""Pairs of shapes: captions that differ in one thing, drawn and judged by the generator, like PairComp."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thinkclearly.data.pairs import KINDS, read_images, shape_pairs
from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import Scene
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.evaluation.benchmarks import shapes_pairs
from thinkclearly.evaluation.benchmarks.report import report
from thinkclearly.evaluation.benchmarks.shapes_pairs import look, measure_pairs, shape_prompts, summarise
from thinkclearly.models.finetunes import load_any

SETTINGS = DecodeSettings(cfg_weight=2.0)
PAIRS = 6


@pytest.fixture(scope="module")
def rows():
    return shape_pairs(PAIRS, "test")


@pytest.fixture(scope="module")
def tiny():
    return load_any("tiny")


@pytest.fixture(scope="module")
def measured(tiny, rows):
    return measure_pairs(*tiny, rows, SETTINGS)


def looked(model, partner=False, tokenizer=True, diversity=1.0):
    return {"model": model, "partner": [partner], "tokenizer": [tokenizer], "diversity": diversity}


def assert_same(found, expected):
    """Pictures may differ by a level, which the batch decides, and so may what is between samples."""
    assert found.keys() == expected.keys()
    for mean, rows in found.items():
        assert rows == {name: pytest.approx(numbers, abs=0.02) for name, numbers in expected[mean].items()}


def test_a_prompt_has_its_own_scene_and_its_partners(rows):
    prompts = shape_prompts(rows)
    assert sorted(prompt.kind for prompt in prompts[::2]) == sorted(KINDS)
    assert [prompt.text for prompt in prompts[:2]] == rows[0]["prompts"]
    for prompt in prompts:
        assert prompt.scene.caption() == prompt.text != prompt.partner.caption()
    assert [Scene.from_json(text) for text in rows[3]["scene"]] == [prompt.scene for prompt in prompts[6:8]]


def test_the_true_pictures_are_shown_and_the_partners_are_not(tiny, rows):
    prompts = shape_prompts(rows)
    true = [[picture] for row in rows for picture in read_images(row)]
    swapped = [true[i ^ 1] for i in range(len(true))]
    assert all(row["model"] == [True] and row["diversity"] is None for row in look(*tiny, prompts, true))
    for row in look(*tiny, prompts, swapped):
        assert row["model"] == row["partner"] == [False]


def test_a_pair_counts_wholly_where_all_of_its_pictures_are_right(rows):
    first, second = (prompt.kind for prompt in shape_prompts(rows)[:4:2])
    prompts = shape_prompts(rows.select(range(2)))
    rows = [looked([True, True]), looked([True, True], diversity=3.0), looked([True, False]), looked([False, False])]
    found = summarise(prompts, rows)
    arithmetic = {"pictures": 8, first: 1.0, second: 0.25, "Average": 0.625, "diversity": 1.5}
    assert found["arithmetic"]["model"] == arithmetic
    assert found["geometric"]["model"] == {"pictures": 8, first: 1.0, second: 0.0, "Average": 0.5}
    assert found["geometric"]["partner"] == {"pictures": 4, first: 0.0, second: 0.0, "Average": 0.0}
    assert found["geometric"]["tokenizer"]["Average"] == 1.0


def test_measuring_in_memory_judges_what_the_model_draws(tiny, rows, measured, monkeypatch):
    shown = []
    monkeypatch.setattr(shapes_pairs, "is_shown", lambda *args: shown.append(args) or is_shown(*args))
    assert_same(measure_pairs(*tiny, rows, SETTINGS, batch_size=4), measured)  # whatever is drawn beside it
    model, partner = measured["arithmetic"]["model"], measured["arithmetic"]["partner"]
    assert model["pictures"] == 4 * PAIRS and partner["Average"] == 0
    assert 0 < model["Average"] < measured["arithmetic"]["tokenizer"]["Average"] <= 1
    assert measured["geometric"]["model"]["Average"] <= model["Average"]
    assert model["diversity"] > 1
    truth = [is_shown(*args) for args in shown]
    assert np.mean([truth[4 * i] + truth[4 * i + 1] for i in range(2 * PAIRS)]) / 2 == pytest.approx(model["Average"])


def test_greedy_samples_do_not_differ(tiny, rows):
    found = measure_pairs(*tiny, rows.select([0]), DecodeSettings(temperature=0.0, use_cfg=False), num_samples=3)
    assert found["arithmetic"]["model"]["diversity"] == 0 and found["arithmetic"]["model"]["pictures"] == 6


# ---- the command -------------------------------------------------------------------------------------------------


def command(output):
    script = Path(__file__).parents[1] / "scripts" / "evaluate.py"
    flags = ["--benchmark", "shapes-pairs", "--limit", PAIRS, "--batch_size", 4, "--output_dir", output]
    flags += ["--cfg_weight", 2, "--temperature", 1]
    return [str(part) for part in [sys.executable, script, *flags]]


def pictures(output):
    return {path.name: Image.open(path).tobytes() for path in (output / "pictures").glob("*_*_*.png")}


def test_a_killed_command_goes_on_and_ends_where_one_that_was_not_killed_does(measured, tmp_path):
    output = tmp_path / "out"
    process = subprocess.Popen(command(output), stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(output.glob("pictures/*_*_*.png"))) < 4:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: (output / "pictures" / name).stat().st_mtime_ns for name in pictures(output)}
    assert 4 <= len(before) < 4 * PAIRS
    result = subprocess.run(command(output), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    after = {name: (output / "pictures" / name).stat().st_mtime_ns for name in pictures(output)}
    finished = [name for name in before if name.replace("_0.png", "_1.png") in before]
    assert len(after) == 4 * PAIRS and all(after[name] == before[name] for name in finished)
    found = json.loads((output / "results.json").read_text())
    assert_same({mean.removesuffix(" mean"): rows for mean, rows in found["results"].items()}, measured)
    text = (output / "results.md").read_text()
    assert text == report(found) and "| this model | 24 |" in text and "not our runs" not in text
    assert "Model tiny." in text and "through the tokenizer" in text
    shutil.rmtree(output)
