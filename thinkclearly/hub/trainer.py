"""PublishingTrainer: `push_to_hub: true` in a recipe, with the Trainer's own strategies and our own choice of files.

Knows when something is pushed. What is pushed, and how, is `hub.publish`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, run_as_future, upload_folder
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from thinkclearly.hub.card import write_card
from thinkclearly.hub.publish import staged, staged_checkpoint, upload

logger = logging.getLogger(__name__)

CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
_FAILED = "Pushing a checkpoint failed, training goes on: %s"


class PublishingTrainer:
    """A mixin before a Trainer: its `hub_model_id`, `hub_strategy`, `hub_private_repo`, `hub_revision` and `hub_token`
    work as the Trainer's, but which uploads a fine-tune's files and card only: the Trainer would add its arguments,
    logs and whatever else lies in `output_dir`.

    Whole checkpoints, for `hub_strategy: checkpoint` and `all_checkpoints`, go to a folder of their own. Every
    checkpoint gets our card beside its weights.
    """

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **_,
    ) -> CommitInfo | Future | None:
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        future = self._push(self.args.output_dir, commit_message, token, revision)
        return future.result() if blocking else future

    def _push(self, directory: str, message: str, token: str | None = None, revision: str | None = None) -> Future:
        send = partial(
            upload,
            repo_id=self.hub_model_id,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            message=message,
        )
        return _in_background(staged(directory, self.hub_model_id, share_samples=self.args.share_samples), send)

    def _push_whole(self, checkpoint: str, message: str) -> Future:
        last = self.args.hub_strategy == HubStrategy.CHECKPOINT
        send = partial(
            upload_folder,
            repo_id=self.hub_model_id,
            token=self.args.hub_token,
            path_in_repo="last-checkpoint" if last else Path(checkpoint).name,
            commit_message=message,
            revision=self.args.hub_revision,
        )
        return _in_background(staged_checkpoint(checkpoint), lambda folder: send(folder_path=folder))

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            write_card(Path(self._get_output_dir(trial=trial)) / checkpoint, self.hub_model_id)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        message = f"Training in progress, step {self.state.global_step}"
        try:
            jobs = [self._push(checkpoint_folder, message)]
            if self.args.hub_strategy in CHECKPOINTS:
                jobs.append(self._push_whole(checkpoint_folder, f"{message}, checkpoint"))
        except (OSError, ValueError) as error:  # a card that cannot be read, no room in TMPDIR
            return logger.warning(_FAILED, error)
        for job in jobs:
            job.add_done_callback(_tell)
        self.push_in_progress = PushInProgress(jobs)


def _in_background(stage: AbstractContextManager[Path], send: Callable[[Path], CommitInfo]) -> Future:
    """Puts the files together now, and sends them while training goes on: what is trained meanwhile stays out."""
    held = ExitStack()
    folder = held.enter_context(stage)

    def run() -> CommitInfo:
        with held:
            return send(folder)

    return run_as_future(run)


def _tell(job: Future) -> None:
    """A push in the middle of training that fails is no reason to stop, nor to be silent."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning(_FAILED, job.exception())
