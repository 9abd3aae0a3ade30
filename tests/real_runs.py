"""Trainings through the real command: how one is killed, and what it leaves."""

import json
import signal
import subprocess
import sys
from pathlib import Path

KILLED = """
import os, signal, sys
from thinkclearly import cli
from thinkclearly.training.callbacks import Speed

def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

Speed.on_step_end = on_step_end
cli.main(sys.argv[1:])
"""


def run_and_kill(argv: list[str], step: int, environment: dict) -> None:
    """Runs `thinkclearly ARGV`, which is killed at the end of a step."""
    command = [sys.executable, "-c", KILLED.format(step=step), *argv]
    root = Path(__file__).parents[1]
    process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-4000:]


def results(folder: Path) -> dict:
    """What a run measured in the end."""
    return json.loads((folder / "all_results.json").read_text())
