"""The promises of the README, kept by the real scripts and the real command in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.data.sources import EditExample, write_folder

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*command, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A small folder of sample_XXXX directories, one of them landscape."""
    photos = packaged_photos("train")
    examples = []
    for i in range(8):
        edit = random_edit(11, i, photos)
        source, target, mask = edit.render(*((96, 96) if i else (144, 96)))
        examples.append(EditExample(source, target, edit.instruction, mask, key=str(i)))
    folder = tmp_path_factory.mktemp("samples")
    write_folder(examples, folder)
    return folder


@pytest.fixture(scope="module")
def trained(golden, samples, tmp_path_factory):
    """`accelerate launch scripts/train.py recipes/a40.yaml` itself, with nothing but overrides."""
    output = tmp_path_factory.mktemp("run")
    overrides = {
        "base_model": golden / "checkpoint",
        "source": "folder",
        "path": samples,
        "eval_samples": 2,
        "prepared_dir": output / "prepared",
        "output_dir": output / "model",
        "max_steps": 3,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 0,
    }
    flags = [str(part) for key, value in overrides.items() for part in (f"--{key}", value)]
    launch = [BIN / "accelerate", "launch", "--num_processes", "1", "--cpu", "scripts/train.py", "recipes/a40.yaml"]
    run(*launch, *flags)
    return output / "model", [*launch, *flags]


def test_a40_recipe_trains_saves_and_evaluates(trained):
    model, _ = trained
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "gen_head_clear.safetensors",
        "clear_config.json",
    ):
        assert (model / name).is_file()
    results = json.loads((model / "all_results.json").read_text())
    assert np.isfinite(results["eval_loss"]) and 0 <= results["eval_clear_rate_true"] <= 1
    history = json.loads((model / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    assert list((model / "samples").glob("step_*.png"))


def test_a_second_launch_goes_on_from_the_last_checkpoint(trained):
    model, launch = trained
    before = (model / "trainer_state.json").read_text()
    output = run(*launch, "--max_steps", "4")
    assert "Going on from" in output.stderr
    assert "Gate calibrated on 2 edits" in output.stderr or "The gate stays uncalibrated: " in output.stderr
    history = json.loads((model / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["step"] == 4 and json.loads(before)["log_history"][0] == history[0]


def test_the_command_edits_and_evaluates(trained, golden, samples, tmp_path):
    model, _ = trained
    source = samples / "sample_0000" / "source.png"
    run(BIN / "thinkclearly", "edit", "--model", model, "--image", source, "--instruction", "Make the star red.",
        "--output_dir", tmp_path / "edit", "--trace", "true")  # fmt: skip
    names = {path.name for path in (tmp_path / "edit").iterdir()}
    assert {
        "raw_model.png",
        "token_composite.png",
        "pixel_composite.png",
        "clear_mask.png",
        "input_decoded.png",
    } <= names
    assert {"result.json", "token_trace.jsonl"} <= names
    original = np.asarray(Image.open(source).convert("RGB"))
    composite = np.asarray(Image.open(tmp_path / "edit" / "pixel_composite.png"))
    clear = np.asarray(Image.open(tmp_path / "edit" / "clear_mask.png")) > 127
    assert composite.shape == original.shape and (composite[clear] == original[clear]).all()
    run(BIN / "thinkclearly", "evaluate", tmp_path / "edit")
    assert (tmp_path / "edit" / "metrics.json").is_file()


def test_wrong_input_is_a_message_and_not_a_traceback(trained, tmp_path):
    result = subprocess.run(
        [BIN / "thinkclearly", "edit", "--model", trained[0], "--image", tmp_path / "none.png", "--instruction", "x"],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1 and "none.png" in result.stderr and "Traceback" not in result.stderr


def test_demo_writes_its_report(tmp_path):
    run(BIN / "thinkclearly", "demo", "recipes/tiny.yaml", "--output_dir", tmp_path / "demo", "--limit", 48,
        "--eval_samples", 4, "--max_steps", 2, "--eval_steps", 2,
        "--demo_edits", 4, "--demo_photo_edits", 1)  # fmt: skip
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "pixel_composite" in page or "composite" in page
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics["held_out"]["edits"] == 4 and "raw" in metrics["held_out"]["pictures"]
    assert (tmp_path / "demo" / "photographs" / "0000" / "pixel_composite.png").is_file()
