"""Checkpoints that survive a kill: transformers' Trainer with whole, half-written and finished ones told apart.

Knows the order in which a checkpoint is written. Does not know what is trained.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

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
    """
    whole = {}
    for folder in Path(directory).glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) is None:
            continue
        if is_whole(folder):
            whole[int(match[1])] = folder
        elif PartialState().is_main_process:
            logger.warning("%s was not written to its end and is removed", folder)
            shutil.rmtree(folder)
    return whole[max(whole)] if whole else None


class ResumableTrainer(Trainer):
    """A Trainer that can be killed at any moment and goes on from `last_checkpoint`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with _named_disk_errors(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # what is overwritten is not whole until it is again
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with _named_disk_errors(checkpoint):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The last file of every process; the main one's state file, which comes next, vouches for all of them.
        self.accelerator.wait_for_everyone()

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
