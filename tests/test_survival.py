"""Runs that are killed, terminated or out of disk go on by the same command, and end as if nothing had happened."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from thinkclearly import cli
from thinkclearly.training.checkpoints import last_checkpoint

ROOT = Path(__file__).parents[1]
STEPS = 9  # of 12 in the first pass: where the data ends must not be what ends a resumed run
OPTIONS = {
    "lora_r": 4,
    "lora_dropout": 0.1,
    "limit": 24,
    "eval_samples": 2,
    "sample_edits": 1,
    "prepare_batch_size": 4,
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "save_steps": 2,
    "eval_steps": 6,
    "logging_steps": 1,
    "tune_clear_weight": "true",
    "use_cpu": "true",
}
RESULT = ("adapter_model.safetensors", "gen_head_clear.safetensors", "clear_config.json")


def arguments(folder):
    options = OPTIONS | {"prepared_dir": folder / "prepared", "output_dir": folder / "model"}
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return ["train", str(ROOT / "recipes" / "tiny.yaml"), *flags]


def result(folder):
    return {name: (folder / "model" / name).read_bytes() for name in RESULT}


# ---- kill -9 -----------------------------------------------------------------------------------------------------


def launch(folder):
    """The real command in a process of its own, with a data cache of its own."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "0"}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    with open(folder / "log", "ab") as log:
        command = [Path(sys.executable).parent / "thinkclearly", *arguments(folder)]
        return subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log)


def events(folder):
    """What a run has come to so far: files that it has made, as they appear, and the progress in its log."""
    # os.walk, since folders are renamed and removed meanwhile.
    paths = (Path(parent, name).relative_to(folder) for parent, *names in os.walk(folder) for name in sum(names, []))
    # datasets draws the names of its temporary files, and locks are named by where they are; ours are numbered.
    kept = (str(path) for path in paths if path.name[:3] != "tmp" and path.suffix != ".lock")
    files = {re.sub(r"\.[0-9a-f]{32}\.tmp$", ".tmp", path) for path in kept}
    log = (folder / "log").read_text(encoding="utf-8", errors="replace")
    return files | set(re.findall(rf"tokenize: +\d+%|\b\d+/{STEPS} \[", log))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The result of a run that nobody disturbs, and its events in their order."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process, order = launch(folder), {}
    while process.poll() is None:
        order |= dict.fromkeys(sorted(events(folder) - order.keys()))
        time.sleep(0.01)
    assert process.returncode == 0, (folder / "log").read_text()[-4000:]
    return result(folder), list(order)


def killed(folder, coming):
    """Starts the command and kills it as soon as one of the events has come; whether it was still running."""
    process = launch(folder)
    while process.poll() is None and events(folder).isdisjoint(coming):
        time.sleep(0.01)
    process.kill()
    return process.wait() == -signal.SIGKILL


def ends_the_same(folder, uninterrupted, kills):
    expected, order = uninterrupted
    moments = random.Random(0)
    for left in range(kills, 0, -1):
        reached = events(folder) if (folder / "log").exists() else set()
        first = max((number for number, event in enumerate(order, 1) if event in reached), default=0)
        moment = first + moments.randrange((len(order) - first) // left)
        assert killed(folder, order[moment:]), (folder / "log").read_text()[-4000:]
        print(f"killed at event {moment} of {len(order)}, {order[moment]!r}")  # noqa: T201
    process = launch(folder)
    assert process.wait() == 0, (folder / "log").read_text()[-4000:]
    assert result(folder) == expected


def test_a_run_killed_three_times_ends_bit_identical(tmp_path, uninterrupted):
    ends_the_same(tmp_path, uninterrupted, kills=3)


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_bit_identical(tmp_path, uninterrupted):
    ends_the_same(tmp_path, uninterrupted, kills=10)


# ---- SIGTERM and a full disk, in this process --------------------------------------------------------------------


def train(folder, *flags):
    """The command in this process; its exit status."""
    try:
        cli.main([*arguments(folder), *flags])
    except SystemExit as stop:
        return stop.code
    return 0


def terminate_when(path):
    while not path.exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def largest_file(size):
    """The disk takes no file above `size` bytes: a write fails in its middle, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sigterm_saves_first_and_a_full_disk_spoils_nothing(tmp_path, one_thread, uninterrupted, caplog):
    model = tmp_path / "model"
    first = model / "checkpoint-2" / "trainer_state.json"
    threading.Thread(target=terminate_when, args=[first], daemon=True).start()
    handler = signal.getsignal(signal.SIGTERM)
    assert train(tmp_path) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    last = last_checkpoint(model)
    assert f"step {last.name[11:]} is done and saved" in caplog.text
    assert last.name not in ("checkpoint-2", f"checkpoint-{STEPS}") and not (model / RESULT[0]).exists()

    whole = {path: path.read_bytes() for path in last.iterdir()}
    for name in ("adapter_model.safetensors", "optimizer.pt"):  # the second is the larger one
        caplog.clear()
        with largest_file(len(whole[last / name]) - 1):
            assert train(tmp_path) == 1
        assert re.search(r"checkpoint-\d+ could not be written: .*same command again to go on", caplog.text)
        assert "Traceback" not in caplog.text
        assert {path: path.read_bytes() for path in last.iterdir()} == whole
    assert train(tmp_path) == 0
    assert result(tmp_path) == uninterrupted[0]


# ---- half a checkpoint -------------------------------------------------------------------------------------------


def test_half_a_checkpoint_is_removed_and_never_the_last(tmp_path):
    for name, state in {"2": "{}", "4": '{"global_step": 4}', "6": '{"global_s', "8": "", "10": None}.items():
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "run.json").write_text("{}")
        if state is not None:
            (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-best"}
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_half_a_checkpoint_is_not_resumed_from_when_it_is_asked_for(tmp_path, caplog):
    half = tmp_path / "checkpoint-3"
    half.mkdir()
    assert train(tmp_path, "--resume_from_checkpoint", str(half)) == 1
    assert f"{half} is no checkpoint of ours or was not written to its end" in caplog.text
