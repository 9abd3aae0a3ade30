"""Benchmarks of drawing with a model that thinks: its first and last pictures, each a row of the same table."""

import json

import numpy as np
import pytest
from conftest import GOLDEN_ROOT
from PIL import Image

import thinkclearly
from thinkclearly import cli
from thinkclearly.data.pairs import shape_pairs
from thinkclearly.data.shape_score import is_shown
from thinkclearly.evaluation.benchmarks.shapes_pairs import shape_prompts
from thinkclearly.generation.think import Thought

ROOT = GOLDEN_ROOT / "chameleon_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]


def evaluate(output, *flags, model=ROOT / "checkpoint"):
    named = [] if model is None else ["--model", model]
    argv = ["--benchmark", "shapes-pairs", "--limit", 1, "--output_dir", output, *named, *flags]
    cli.main(["evaluate", *map(str, argv)])
    return json.loads((output / "results.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_chameleon_draws_at_once(tmp_path):
    found = evaluate(tmp_path / "out")
    assert list(found["results"]["arithmetic mean"]) == ["model", "partner", "tokenizer"]
    assert found["results"]["arithmetic mean"]["model"]["pictures"] == 4
    model = thinkclearly.load_model(str(ROOT / "checkpoint"))
    first = shape_prompts(shape_pairs(1, "test", size=8))[0].text
    drawn = model.generate(first, num_images=2)
    for k, picture in enumerate(drawn):
        assert np.abs(pixels(tmp_path / "out" / "pictures" / f"0_0_{k}.png") - np.asarray(picture)).max() <= 1


def test_the_ends_of_a_thought_are_rows_of_one_table(tmp_path):
    output, flags = tmp_path / "out", ["--mode", "critique", "--max_length", 300, "--max_pictures", 2]
    found = evaluate(output, *flags)
    for rows in found["results"].values():
        assert list(rows) == ["first", "last", "partner", "tokenizer"]
    assert found["run"]["thinking"]["mode"] == "critique" and "mode critique" in found["notes"][0]
    text = (output / "results.md").read_text()
    assert "a thought's first picture | 4 |" in text and "a thought's last picture | 4 |" in text
    thoughts = [json.loads(line) for line in (output / "thoughts" / "thoughts.jsonl").read_text().splitlines()]
    names = [f"0_{i}_{k}.png" for i in range(2) for k in range(2)]
    for thought, name in zip(thoughts, names, strict=True):
        for end, path in (("first", thought["image_paths"][0]), ("last", thought["image_paths"][-1])):
            assert np.array_equal(pixels(output / end / name), pixels(output / "thoughts" / path))
    lines = [json.loads(line) for line in (output / "measured.jsonl").read_text().splitlines()[1:]]
    prompts = shape_prompts(shape_pairs(1, "test", size=8))
    for line in lines:
        number = int(line["key"])
        shown = [
            is_shown(Image.open(output / line["setting"] / f"0_{number}_{k}.png"), prompts[number].scene)
            for k in (0, 1)
        ]
        assert line["rows"]["model"] == shown
    assert {(line["setting"], line["key"]) for line in lines} == {(end, k) for end in ("first", "last") for k in "01"}
    assert (output / "thoughts" / "index.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in (output / "thoughts").glob("*/thought.json")}
    assert evaluate(output, *flags) == found
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_thought_without_a_picture_counts_as_a_black_one(tmp_path):
    flags = ["--mode", "subgoals", "--max_length", 1, "--num_images", 1]  # no room for a picture
    found = evaluate(tmp_path / "out", *flags)
    assert found["notes"][1] == "2 thoughts ended without a picture and count as black ones."
    assert not pixels(tmp_path / "out" / "last" / "0_1_0.png").any()
    assert found["results"]["arithmetic mean"]["last"]["Average"] == 0


def test_a_model_without_a_stream_is_measured_in_the_same_way(tmp_path):
    found = evaluate(tmp_path / "out", "--mode", "critique", "--num_images", 1, model=None)
    assert list(found["results"]["arithmetic mean"])[:2] == ["first", "last"]
    model = thinkclearly.load_model("tiny")
    first = shape_prompts(shape_pairs(1, "test", size=8))[0].text
    thought = Thought(list(model.think(first)))
    for end in ("first", "last"):
        assert np.abs(pixels(tmp_path / "out" / end / "0_0_0.png") - np.asarray(getattr(thought, end))).max() <= 1


def test_a_recipe_may_say_that_the_model_thinks(tmp_path):
    recipe = tmp_path / "benchmark.yaml"
    recipe.write_text("benchmark: shapes-pairs\nmode: critique\nmax_length: 300\nmax_pictures: 1\nlimit: 1\n")
    flags = ["--model", ROOT / "checkpoint", "--output_dir", tmp_path / "out"]
    cli.main(["evaluate", str(recipe), *map(str, flags)])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["geometric mean"]
    assert rows["first"] == rows["last"]
