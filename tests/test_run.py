"""A training run from its options to what it leaves behind, and the same command again."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from thinkclearly import cli
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.data.sources import EditExample, write_folder

RECIPE = str(Path(__file__).parents[1] / "recipes" / "tiny.yaml")
WEIGHTS = "adapter_model.safetensors"


def flags(options):
    return [str(part) for key, value in options.items() for part in (f"--{key}", value)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Eight photo pairs as sample_XXXX folders."""
    folder, photos = tmp_path_factory.mktemp("samples"), packaged_photos("train")
    edits = [random_edit(11, i, photos) for i in range(8)]
    write_folder([EditExample(*e.render(96, 96)[:2], e.instruction) for e in edits], folder)
    return folder


@pytest.fixture(scope="module")
def train(golden, samples, tmp_path_factory):
    """Trains the reference checkpoint on the samples, in this process; the exit status."""
    defaults = {"base_model": golden / "checkpoint", "source": "folder", "path": samples, "eval_samples": 3}
    defaults |= {"prepared_dir": tmp_path_factory.mktemp("prepared"), "lora_r": 4, "calibration_edits": 0}
    defaults |= {"per_device_train_batch_size": 2, "save_steps": 1, "sample_edits": 0, "eval_strategy": "no"}

    def start(output, **options):
        try:
            cli.main(["train", RECIPE, *flags(defaults | {"max_steps": 1, "output_dir": output} | options)])
        except SystemExit as stop:
            return stop.code
        return 0

    return start


@pytest.fixture(scope="module")
def one_step(train, tmp_path_factory):
    """A run of one step that has come to its end."""
    output = tmp_path_factory.mktemp("one") / "run"
    assert train(output) == 0
    return output


@pytest.fixture
def output(one_step, tmp_path):
    """A copy of it, to go on from."""
    return shutil.copytree(one_step, tmp_path / "run")


def state_of(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


# ---- the same command, and another one ----------------------------------------------------------------------------


def test_a_run_that_is_done_is_left_alone_by_the_same_command(train, output, caplog):
    before = state_of(output)
    with caplog.at_level(logging.INFO):
        assert train(output) == 0
    assert f"{output}: this run has come to its end already; there is nothing to do" in caplog.text
    assert state_of(output) == before


@pytest.mark.parametrize("root_only", [False, True], ids=["with checkpoints", "without"])
def test_what_the_weights_depend_on_cannot_change_and_is_named(train, output, caplog, root_only):
    if root_only:
        shutil.rmtree(output / "checkpoint-1")
    before = state_of(output)
    changed = {"learning_rate": 2e-3, "seed": 7, "clear_weight": 0.5, "lora_alpha": 8, "max_steps": 2}
    assert train(output, **changed, per_device_train_batch_size=1) == 1
    for line in (
        "learning_rate: 0.001, now 0.002",
        "seed: 42, now 7",
        "clear_weight: 0.3, now 0.5",
        "lora_alpha: 64, now 8",
        "records_per_step: 2, now 1",
    ):
        assert f"\n  {line}\n" in caplog.text
    assert "max_steps" not in caplog.text and "--overwrite_output_dir true" in caplog.text
    assert state_of(output) == before


def test_another_base_of_the_same_shape_is_refused(golden, train, output, tmp_path, caplog):
    base = shutil.copytree(golden / "checkpoint", tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.startswith("gen_head.") and name.endswith("weight"))
    save_file(weights | {name: weights[name] + 0.1}, base / "model.safetensors", metadata={"format": "pt"})
    before = state_of(output)
    assert train(output, base_model=base, max_steps=2) == 1
    assert "fingerprint of the base model: " in caplog.text and "base_model: 'checkpoint', now 'other'" in caplog.text
    assert "codebook" not in caplog.text
    assert state_of(output) == before


def test_data_behind_the_same_name_must_be_the_same(train, samples, output, tmp_path, caplog):
    other = shutil.copytree(samples, tmp_path / samples.name)
    for sample in other.iterdir():
        metadata = json.loads((sample / "metadata.json").read_text())
        (sample / "metadata.json").write_text(json.dumps(metadata | {"instruction": "Make it blue."}))
    assert train(output, path=other, max_steps=2) == 1
    assert "fingerprint of the training data: " in caplog.text and "path: " not in caplog.text


def test_base_and_data_may_have_moved(golden, train, samples, output, tmp_path, caplog):
    moved = {"base_model": shutil.copytree(golden / "checkpoint", tmp_path / "base")}
    moved |= {"path": shutil.copytree(samples, tmp_path / "pairs")}
    with caplog.at_level(logging.INFO):
        assert train(output, **moved, max_steps=2) == 0
    assert f"Going on from {output / 'checkpoint-1'}" in caplog.text


def test_what_may_change_does(train, output, caplog):
    weights = (output / WEIGHTS).read_bytes()
    with caplog.at_level(logging.INFO):
        assert train(output, max_steps=3, save_steps=3, save_total_limit=5, logging_steps=2, prefer="exact") == 0
    assert "From step 1 on with max_steps=3 (before: 1)" in caplog.text
    assert "lr_scheduler_type=cosine depends on the length of the run" in caplog.text
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "loss" in log] == [2]
    assert json.loads((output / "clear_config.json").read_text())["edit"]["prefer"] == "exact"
    assert (output / WEIGHTS).read_bytes() != weights
    for folder in (output, output / "checkpoint-3"):
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["max_steps"] == 3
        (change,) = json.loads((folder / "run.json").read_text())["changes"]
        assert change["step"] == 1 and change["max_steps"] == [1, 3] and change["save_steps"] == [1, 3]
    assert yaml.safe_load((output / "checkpoint-1" / "recipe.yaml").read_text())["max_steps"] == 1

    assert train(output, max_steps=2) == 1
    assert f"{output / 'checkpoint-3'} is beyond the end, max_steps=2" in caplog.text


def test_records_of_a_step_may_be_shared_out_in_another_way(train, output):
    assert train(output, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2) == 0


def test_no_checkpoint_no_going_on(train, output, caplog):
    shutil.rmtree(output / "checkpoint-1")
    before = state_of(output)
    assert train(output) == 0, "nothing to do"
    assert train(output, max_steps=2) == 1
    assert "no checkpoint to go on from" in caplog.text
    assert state_of(output) == before


def test_starting_over_leaves_nothing_of_the_earlier_run(train, output, caplog):
    (output / "README.md").write_text("My own words.")
    (output / "samples").mkdir()
    for name in ("step_000100.png", "mine.png"):
        (output / "samples" / name).write_bytes(b"")
    weights = (output / WEIGHTS).read_bytes()
    shutil.copytree(output / "checkpoint-1", output / "checkpoint-5")
    assert train(output, seed=7, overwrite_output_dir=True) == 0
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (output / WEIGHTS).read_bytes() != weights
    assert yaml.safe_load((output / "recipe.yaml").read_text())["seed"] == 7
    assert [path.name for path in (output / "samples").iterdir()] == ["mine.png"]
    assert train(output, overwrite_output_dir=True, resume_from_checkpoint=output / "checkpoint-1") == 2


def test_a_folder_of_somebody_else_is_neither_used_nor_removed(train, output, caplog):
    theirs = output / "checkpoint-7"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("Mine.")
    before = state_of(output)
    for options in ({"max_steps": 2}, {"overwrite_output_dir": True}):
        assert train(output, **options) == 1
        assert f"{theirs} has no run.json, so no run of this version wrote it" in caplog.text
        assert state_of(output) == before
        caplog.clear()


# ---- bad records -------------------------------------------------------------------------------------------------


def test_records_that_are_skipped_are_neither_sampled_nor_exported(golden, samples, train, tmp_path):
    """Neither into what is held out nor into what is trained on."""
    damaged = tmp_path / "damaged"
    shutil.copytree(samples, damaged)
    for i in (2, 5):
        (damaged / f"sample_000{i}" / "source.png").write_bytes(b"no picture")
    options = {"eval_samples": 6, "sample_edits": 6, "eval_strategy": "steps", "eval_steps": 1}
    assert train(tmp_path / "run", path=damaged, on_bad_record="skip", **options) == 0
    assert (tmp_path / "run" / "samples" / "step_000001.png").is_file()
    options = {"base_model": golden / "checkpoint", "source": "folder", "path": damaged, "eval_samples": 0}
    options["calibration_edits"] = 0
    options |= {"prepared_dir": tmp_path / "prepared", "output_dir": tmp_path / "look"}
    options |= {"on_bad_record": "skip", "export_folder": tmp_path / "export"}
    cli.main(["prepare", *flags(options)])
    assert len(list((tmp_path / "export").glob("sample_*"))) == 6
