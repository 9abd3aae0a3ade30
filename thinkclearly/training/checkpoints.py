"""Checkpoints that survive a kill: transformers' Trainer with whole, half-written and others' ones told apart.

Knows the order in which a checkpoint is written. Does not know what is trained.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from thinkclearly.files import write_text
from thinkclearly.models.instruction_head import CONFIG_FILE, HEAD_FILE
from thinkclearly.training.options import RunArguments
from thinkclearly.training.runs import RUN_FILE, Run, allowed_changes, check_unchanged, read_run

logger = logging.getLogger(__name__)


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end: its state file comes last, and half of one is no JSON."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run, `None` where there is none.

    What a killed run left half-written is removed: it would count as one of the checkpoints that are kept.

    Raises:
        ValueError: a folder that is named like a checkpoint and is not one of ours. It is left alone.
    """
    with PartialState().main_process_first():
        found = _checkpoints(directory)
        for folder in found.values():
            if not is_whole(folder):
                logger.warning("%s was not written to its end and is removed", folder)
                shutil.rmtree(folder)
    return next((found[step] for step in sorted(found, reverse=True) if is_whole(found[step])), None)


def start_over(directory: str | os.PathLike) -> None:
    """Removes what an earlier run left in its output folder: checkpoints, samples, and what makes it a fine-tune."""
    for folder in _checkpoints(directory).values():
        shutil.rmtree(folder)
    for name in (RUN_FILE, CONFIG_FILE, HEAD_FILE, "adapter_model.safetensors", "all_results.json"):
        (Path(directory) / name).unlink(missing_ok=True)
    for picture in Path(directory).glob("samples/step_*.png"):
        picture.unlink()


def _checkpoints(directory: str | os.PathLike) -> dict[int, Path]:
    """Step → folder; `RUN_FILE` is the first file in it and tells it from others', which the Trainer would remove."""
    found = {}
    for folder in Path(directory).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            if not (folder / RUN_FILE).is_file():
                raise ValueError(
                    f"{folder} has no {RUN_FILE}, so no run of this version wrote it. Move it away or give another "
                    "output_dir: a run goes on from folders of this name, and removes old ones."
                )
            found[int(match[1])] = folder
    return found


class EarlierRun:
    """What `output_dir` holds of a run, and whether another one may go on from it; nothing where it is to start over.

    Attributes:
        checkpoint: to go on from, None where there is none.

    Raises:
        ValueError: `resume_from_checkpoint` is no whole checkpoint of ours.
    """

    def __init__(self, training: RunArguments):
        self.output, self.checkpoint, self.run = Path(training.output_dir), None, None
        if training.overwrite_output_dir:
            return
        self.checkpoint = last_checkpoint(self.output)
        self.finished = read_run(self.output)
        if training.resume_from_checkpoint:
            self.checkpoint, self.finished = Path(training.resume_from_checkpoint), None
            if not is_whole(self.checkpoint) or not (self.checkpoint / RUN_FILE).is_file():
                raise ValueError(
                    f"{self.checkpoint} is no checkpoint of ours or was not written to its end; without "
                    "resume_from_checkpoint the run goes on from the last whole one."
                )
        self.run = read_run(self.checkpoint) if self.checkpoint else self.finished

    def check(self, run: Run) -> None:
        """Raises `ValueError` where `run` differs in what the weights depend on, as far as it is described yet."""
        if self.run is not None:
            check_unchanged(self.run, run, self.checkpoint or self.output)

    def is_finished(self, run: Run) -> bool:
        """Whether `run` has come to its end here, as it is now."""
        return self.run is not None and self.finished is not None and self.finished.is_same(run)

    def go_on_as(self, run: Run) -> None:
        """Takes over into `run` what it changes of the earlier one. Raises `ValueError` where it cannot go on."""
        self.check(run)
        if self.checkpoint is not None:
            run.changes = allowed_changes(self.run, run, self.checkpoint)
            logger.info("Going on from %s", self.checkpoint)
        elif self.run is not None:
            raise ValueError(
                f"{self.output} holds a run that has come to its end, and no checkpoint to go on from. Give another "
                "output_dir, or --overwrite_output_dir true to remove that run and start over."
            )


class ResumableTrainer(Trainer):
    """A Trainer that can be killed at any moment and goes on from `last_checkpoint`.

    Attributes:
        run_files: name → text of files that every checkpoint begins with, `RUN_FILE` among them.
    """

    run_files: Mapping[str, str] = {RUN_FILE: "{}\n"}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with _named_disk_errors(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with _named_disk_errors(checkpoint):
            if self.args.should_save:
                self._begin(checkpoint)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _begin(self, checkpoint: Path) -> None:
        """The folder appears with its first files in it, which say whose it is."""
        (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)  # what is overwritten is not whole until it is again
        folder = checkpoint if checkpoint.exists() else checkpoint.with_name(".checkpoint.tmp")
        for name, text in self.run_files.items():
            write_text(folder / name, text)
        folder.replace(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last file of every process; the main one's state file, which comes next, vouches for all of them.
        self.accelerator.wait_for_everyone()

    def _init_training_state(self, max_steps: int, *args, **kwargs) -> tuple[int, int]:
        # A checkpoint brings along how often its run logged, evaluated and saved.
        trained = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def _run_epoch(self, **kwargs) -> None:
        """Nothing for a run that is resumed at its last step, where the Trainer would take one more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)


class SaveError(OSError):
    """Something could not be written; the message names it and says what to do."""


@contextmanager
def _named_disk_errors(target):
    """safetensors and torch have errors of their own for a full disk, which do not say what was being written."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is None:  # the Hub's, not the disk's
            raise
        if isinstance(error, (torch.OutOfMemoryError, torch.distributed.DistError)):
            raise
        reason = str(error).partition("\n")[0]
        raise SaveError(
            f"{target} could not be written: {reason}. Checkpoints before it are whole: see that the disk has room "
            "and is writable, and give the same command again to go on."
        ) from error
