"""The demo at its smallest, in process; whole in test_end_to_end."""

import json
import math
import re

import numpy as np
import pytest
from conftest import GOLDEN_ROOT
from PIL import Image
from random_photos import photo

from thinkclearly import demo, demo_thoughts
from thinkclearly.data.options import DataArguments
from thinkclearly.data.shapes import Scene
from thinkclearly.data.sources import photos_of, read_example
from thinkclearly.data.thoughts import thought_rows
from thinkclearly.evaluation.edits import Evaluation, judge_shapes

CHAMELEON = GOLDEN_ROOT / "chameleon_tiny"


def test_without_photographs_the_report_has_the_held_out_edits_alone(tmp_path):
    options = {"output_dir": tmp_path, "limit": 4, "eval_samples": 2, "max_steps": 1, "calibration_edits": 0}
    options |= {"sample_edits": 0, "demo_edits": 2, "demo_photo_edits": 0}
    demo.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["held_out"]["edits"] == 2 and "photographs" not in metrics
    assert (tmp_path / "edits" / "0001").is_dir() and not (tmp_path / "photographs").exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 held-out edits" in page and "photographs at their own size" not in page


def measured(scores=(20.0,)):
    """A hand-made evaluation, one edit a score."""
    outside = {
        "raw": (21.5, 0.001, 1128.4),
        "pixel_composite": (29.2, 0.78, 1291.0),
        "copy_source": (math.inf, 1, 9e3),
    }
    keys = ("psnr_pooled_outside", "exact_outside", "mse_inside")
    picture = Image.new("RGB", (8, 8))
    edits = [
        {"source": picture, "composite": picture, "instruction": f"edit {i}", "note": f"{score:.1f} dB"}
        for i, score in enumerate(scores)
    ]
    return Evaluation(
        pictures={name: {"pictures": 1, "mse": 0.0} | dict(zip(keys, values)) for name, values in outside.items()},
        clear={"labels": {"f1": 0.988, "f1_always_clear": 0.846, "edit_iou": 0.95}, "mask": {"edit_iou": 0.943}},
        done={"raw": 0.81, "pixel_composite": 0.8, "copy_source": 0.0},
        log_odds=np.array([2.0, -1.0]),
        instructed=np.array([True, False]),
        scores=np.array(scores),
        reports=edits,
        results=edits,
    )


def test_the_summary_and_the_table_say_what_was_measured():
    assert demo.summary(measured()) == (
        "80% of the asked edits are done (raw decode: 81%). Outside the true mask 78.0% of the pixels are the "
        "source's, byte for byte, and the composite is 7.7 dB above the raw decode. CLEAR F1 0.988 (always CLEAR: "
        "0.846), IoU of the edit with the true mask 0.943."
    )
    assert demo.results(measured()) == [
        ["", "PSNR outside, pooled", "Bit-identical pixels outside", "MSE to the target inside", "Edit done"],
        ["raw", "21.5 dB", "0.10 %", "1128", "81%"],
        ["pixel composite", "29.2 dB", "78.00 %", "1291", "80%"],
        ["copy the source", "∞", "100.00 %", "9000", "0%"],
    ]


def test_the_report_opens_with_the_best_the_median_and_the_worst_edit(tmp_path):
    demo.report(tmp_path, measured((20, 35, 10, 25, 15)), measured((3, 2, 1)), [], {"edit": 1.0})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    opening = page[: page.index("<h2>Results</h2>")]
    assert re.findall(r">(\w+)</p><h3>(edit \d)</h3>", opening) == [
        *(("Best", "edit 0"), ("Median", "edit 1"), ("Worst", "edit 2")),
        *(("Best", "edit 1"), ("Median", "edit 0"), ("Worst", "edit 2")),
    ]
    assert "3 edits of whole photographs at their own size" in opening and "5 held-out edits" in opening
    assert "<details>" not in opening and "F1 of always CLEAR" in page


def test_edits_over_photographs_of_a_folder_are_judged_by_the_scenes_that_were_drawn(tmp_path, own_cache):
    for i in range(5):
        photo(i, 80, 64).save(tmp_path / f"{i}.png")
    data = DataArguments(photos_folder=str(tmp_path))
    judge = judge_shapes(str(tmp_path))
    edits = [read_example(row) for row in demo.held_out_edits(12, data)]
    assert all(judge(edit.key, edit.target) for edit in edits)
    assert not any(judge(edit.key, edit.source) for edit in edits)
    (held_out,) = {edit.before.background.photo for edit, _ in demo.photo_edits(3, photos_of("test", tmp_path))}
    assert held_out not in photos_of("train", tmp_path) + photos_of("calibration", tmp_path)


@pytest.mark.parametrize(("flag", "least"), [("demo_edits", 1), ("demo_photo_edits", 0), ("demo_batch_size", 1)])
def test_too_few_are_refused_before_training(flag, least, capsys):
    with pytest.raises(SystemExit):
        demo.main([f"--{flag}", str(least - 1)])
    assert f"{flag}={least - 1}; expected {least} or more" in capsys.readouterr().err


@pytest.mark.golden
@pytest.mark.skipif(not CHAMELEON.is_dir(), reason="no set chameleon_tiny")
def test_the_demo_of_thinking_trains_thinks_in_three_ways_and_counts_what_is_shown(tmp_path):
    options = {"method": "interleaved", "base_model": CHAMELEON / "checkpoint", "output_dir": tmp_path, "lora_r": 0}
    options |= {"source": "shapes", "limit": 4, "eval_samples": 2, "calibration_edits": 0, "max_steps": 1}
    options |= {"thought_mode": "critique", "shapes_size": 64, "demo_prompts": 2}
    demo.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["prompts"] == 2 and list(metrics["done"]) == [
        "drawn at once",
        "critique, first picture",
        "critique, last picture",
        "sub-goals, last picture",
        "the true picture through the tokenizer",
    ]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for way in demo_thoughts.WAYS:
        assert f'href="{way}/index.html"' in page
        lines = [json.loads(line) for line in (tmp_path / way / "thoughts.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and lines[0]["prompt"] != lines[1]["prompt"]


def test_a_thought_shows_its_scene_if_its_picture_does(tmp_path):
    scenes = [Scene.from_json(text) for text in thought_rows("subgoals", 2, "test")["scene"]]
    for k, scene in enumerate(scenes):
        scene.render(64).save(tmp_path / f"{k}.png")
    rows = [{"image_paths": paths} for paths in (["1.png", None, "0.png"], ["1.png"], [None], [])]
    wanted = [scenes[0], scenes[1], scenes[0], scenes[0]]
    assert demo_thoughts.shown(tmp_path, rows, wanted, 0) == [False, True, False, False]
    assert demo_thoughts.shown(tmp_path, rows, wanted, -1) == [True, True, False, False]


def test_the_page_of_thoughts_tells_what_was_put_right_from_what_was_spoiled(tmp_path):
    rows = [{"sample_id": k, "text": "", "prompt": f"prompt {k}", "image_paths": []} for k in range(4)]
    first, last = [False, True, True, False], [True, False, True, False]
    demo_thoughts.report(tmp_path, {"drawn at once": 0.5}, rows, first, last, {"think": 1.0})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>([^<]+): (\d)</h2>", page) == [
        ("Put right", "1"),
        ("Spoiled", "1"),
        ("Right and left so", "1"),
    ]
    assert re.findall(r'href="critique/(\d)/index.html"', page) == ["0", "1", "2"] and "50%" in page
