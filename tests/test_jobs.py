"""A training run from its options to what it leaves behind."""

import shutil
from pathlib import Path

import pytest

from thinkclearly import cli
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.data.sources import EditExample, write_folder

RECIPE = str(Path(__file__).parents[1] / "recipes" / "tiny.yaml")


def flags(**options):
    return [str(part) for key, value in options.items() for part in (f"--{key}", value)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Eight photo pairs as sample_XXXX folders."""
    folder, photos = tmp_path_factory.mktemp("samples"), packaged_photos("train")
    edits = [random_edit(11, i, photos) for i in range(8)]
    write_folder([EditExample(*e.render(96, 96)[:2], e.instruction) for e in edits], folder)
    return folder


@pytest.fixture
def run(golden, samples, tmp_path):
    """Trains the reference checkpoint on the samples, in this process."""

    def start(**options):
        defaults = {"base_model": golden / "checkpoint", "source": "folder", "path": samples, "eval_samples": 3}
        defaults |= {"prepared_dir": tmp_path / "prepared", "output_dir": tmp_path / "run", "lora_r": 4}
        defaults |= {"per_device_train_batch_size": 2, "max_steps": 1, "eval_steps": 1, "save_steps": 1}
        cli.main(["train", RECIPE, *flags(**(defaults | {"calibration_edits": 0, "sample_edits": 0} | options))])
        return tmp_path / "run"

    return start


# ---- bad records -------------------------------------------------------------------------------------------------


def test_records_that_are_skipped_are_neither_sampled_nor_exported(golden, samples, run, tmp_path):
    """Neither into what is held out nor into what is trained on."""
    damaged = tmp_path / "damaged"
    shutil.copytree(samples, damaged)
    for i in (2, 5):
        (damaged / f"sample_000{i}" / "source.png").write_bytes(b"no picture")
    output = run(path=damaged, on_bad_record="skip", eval_samples=6, sample_edits=6)
    assert (output / "samples" / "step_000001.png").is_file()
    options = {"base_model": golden / "checkpoint", "source": "folder", "path": damaged, "eval_samples": 0}
    options["calibration_edits"] = 0
    options |= {"prepared_dir": tmp_path / "prepared", "output_dir": tmp_path / "look"}
    cli.main(["prepare", *flags(**options, on_bad_record="skip", export_folder=tmp_path / "export")])
    assert len(list((tmp_path / "export").glob("sample_*"))) == 6
