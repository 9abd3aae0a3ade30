"""Two processes do what one does: the real scripts under `accelerate launch` on the CPU (gloo), step by step."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from real_runs import results
from safetensors.torch import load_file

from thinkclearly import cli, load_editor
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.data.sources import EditExample, write_folder

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "accelerate"
RECIPE = str(ROOT / "recipes" / "tiny.yaml")
CODES, POSITIONS = 128, 36
SETTINGS = {
    "source": "jsonl",
    "eval_samples": 5,  # one more than two processes share evenly
    "per_device_eval_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 2,
    "lr_scheduler_type": "constant",  # as far as it went, a shorter run is the longer one
    "sample_edits": 0,
}


def flags(options):
    return [str(part) for key, value in options.items() for part in (f"--{key}", value)]


def launch(config, script, *argv):
    """`accelerate launch` with two processes, whatever the machine."""
    command = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", CONFIGS / config]
    command += ["--num_processes", "2", "--main_process_port", "0", script, *argv]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def several(folder, jobs):
    """A script of several jobs, since starting costs most of the time, on prepared shards of three pairs and
    with logits in chunks of 50 positions at most."""
    script = folder / "several.py"
    script.write_text(
        "from thinkclearly import cli\nfrom thinkclearly.data import encode\n"
        "from thinkclearly.models import cross_entropy\nencode.SHARD_SIZE = 3\ncross_entropy.CHUNK = 50\n"
        + "".join(f"cli.start({job!r}, {argv})\n" for job, argv in jobs)
    )
    return script


def history(directory):
    state = json.loads((directory / "trainer_state.json").read_text())
    return [[log["loss"], log["grad_norm"], log["clear_rate_true"]] for log in state["log_history"] if "loss" in log]


def assert_same_run(found, expected):
    assert results(found)["seconds_per_step"] > 0 and results(found)["samples_per_second"] > 0
    assert 0.1 < results(found)["peak_memory_gib"] < 64
    np.testing.assert_allclose(history(found), history(expected), rtol=2e-4)
    for name in ("loss", "clear_rate_true", "clear_rate_predicted", "code_accuracy", "accuracy", "gate_auc"):
        assert results(found)[f"eval_{name}"] == pytest.approx(results(expected)[f"eval_{name}"], rel=1e-4), name
    for name in ("adapter_model.safetensors", "model.safetensors", "gen_head_clear.safetensors"):
        assert (found / name).is_file() == (expected / name).is_file()
        if (found / name).is_file():
            weights, others = load_file(found / name), load_file(expected / name)
            assert weights.keys() == others.keys()
            for key, weight in weights.items():
                # Adam turns the rounding of gradients near zero into whole steps of single weights.
                assert (weight - others[key]).norm() <= 0.01 * others[key].norm() + 1e-6, key


@pytest.fixture(scope="module")
def settings(golden, tmp_path_factory):
    """Overrides of recipes/tiny.yaml: the golden base, random records."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    with open(path, "w") as file:
        for i in range(29):
            source, target = ([generator.randrange(CODES) for _ in range(POSITIONS)] for _ in range(2))
            labels = ["<CLEAR>" if generator.random() < 0.5 else code for code in target]
            row = {"instruction": f"Edit {i}.", "input_tokens": source, "output_tokens": labels}
            file.write(json.dumps(row) + "\n")
    return SETTINGS | {"base_model": golden / "checkpoint", "path": path}


@pytest.fixture(scope="module")
def one_process(settings, tmp_path_factory):
    """1 × 8 in this process, with LoRA and without; evaluated one by one."""
    runs = {}
    for name, options in {"lora": {}, "full": {"lora_r": 0}}.items():
        runs[name] = tmp_path_factory.mktemp(name)
        options |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 1, "output_dir": runs[name]}
        cli.main(["train", RECIPE, *flags(settings | options)])
    return runs


def test_eight_small_batches_train_as_one(settings, one_process, tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "output_dir": tmp_path}
    cli.main(["train", RECIPE, *flags(settings | options)])
    assert_same_run(tmp_path, one_process["lora"])


def test_two_processes_train_as_one(settings, one_process, tmp_path):
    options = settings | {"per_device_train_batch_size": 4, "output_dir": tmp_path}
    launch("ddp.yaml", several(tmp_path, [("train", [RECIPE, *flags(options)])]))
    assert_same_run(tmp_path, one_process["lora"])


def test_fsdp2_trains_an_adapter_as_one_process(settings, one_process, tmp_path):
    options = {"per_device_train_batch_size": 4, "output_dir": tmp_path, "activation_checkpointing": True}
    launch("fsdp2.yaml", "scripts/train.py", RECIPE, *flags(settings | options))
    assert (tmp_path / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file(), "was it FSDP?"
    assert_same_run(tmp_path, one_process["lora"])
    load_editor(tmp_path)


def test_fsdp2_trains_all_weights_and_resumes(settings, one_process, tmp_path):
    options = settings | {"per_device_train_batch_size": 4, "output_dir": tmp_path, "lora_r": 0}
    jobs = [("train", [RECIPE, *flags(options | {"max_steps": steps})]) for steps in (2, 3)]
    assert "Going on from" in launch("fsdp2.yaml", several(tmp_path, jobs)).stderr
    assert_same_run(tmp_path, one_process["full"])
    load_editor(tmp_path)


def test_two_processes_prepare_edit_and_draw_as_one(golden, one_process, tmp_path):
    photos = packaged_photos("train")
    edits = [random_edit(11, i, photos) for i in range(10)]
    pictures = [edit.render(96, 96) for edit in edits]
    write_folder([EditExample(*p[:2], e.instruction, p[2]) for e, p in zip(edits, pictures)], tmp_path / "pairs")
    (tmp_path / "photos").mkdir()
    for i in range(5):
        pictures[i][0].crop((0, 0, 96, 60 + i)).save(tmp_path / "photos" / f"{i}.png")
    prepare = {"base_model": golden / "checkpoint", "source": "folder", "path": tmp_path / "pairs", "eval_samples": 0}
    prepare["calibration_edits"] = 0
    edit = {"model": one_process["lora"], "input": tmp_path / "photos", "instruction": "Make it red.", "batch_size": 2}
    drawn = {"benchmark": "shapes-pairs", "limit": 3, "model": one_process["lora"], "batch_size": 4}
    jobs, tables, lines = {}, {}, {}
    for name in ("one", "two"):
        out = tmp_path / name
        written = {"prepared_dir": out / "prepared", "output_dir": out / "look", "jsonl": out / "records.jsonl"}
        jobs[name] = [
            ("prepare", flags(prepare | written)),
            ("edit", [str(ROOT / "recipes" / "edit.yaml"), *flags(edit | {"output_dir": out / "edits"})]),
            ("evaluate", flags(drawn | {"output_dir": out / "drawn"})),
        ]
    for job, argv in jobs["one"]:
        cli.main([job, *argv])
    launch("cpu.yaml", several(tmp_path, jobs["two"]))
    shards = {path.name for path in (tmp_path / "two" / "prepared").glob("*/shard-*")}
    assert shards == {f"shard-{i:05d}-of-00004" for i in range(4)}, "both processes should have had some"
    for name in ("one", "two"):
        lines[name] = (tmp_path / name / "records.jsonl").read_bytes()
        path = tmp_path / name / "edits" / "results.parquet"
        tables[name] = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert lines["one"] == lines["two"]
    assert len(tables["two"]) == 5
    tables = {name: table.remove_columns(["seconds", "passes"])[:] for name, table in tables.items()}
    assert tables["one"] == tables["two"]
    pictures = {name: sorted((tmp_path / name / "drawn" / "pictures").glob("*_*_*.png")) for name in tables}
    assert len(pictures["one"]) == len(pictures["two"]) == 12
    for one, two in zip(*pictures.values()):
        difference = np.asarray(Image.open(one), int) - np.asarray(Image.open(two), int)
        assert one.name == two.name and np.abs(difference).max() <= 1
    assert (tmp_path / "two" / "drawn" / "results.json").is_file()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_launch_configuration_is_known_to_accelerate(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    known = {action.dest for action in launch_command_parser()._actions} | {"fsdp_ignored_modules"}  # read, not listed
    assert {**config.fsdp_config, **config.deepspeed_config}.keys() <= known
