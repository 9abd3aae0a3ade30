"""PublishingTrainer: `push_to_hub: true` in a recipe, with the Trainer's own strategies and our own choice of files.

Knows when something is pushed. What is pushed, and how, is `hub.publish`'s.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import CommitInfo, run_as_future, upload_folder
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from thinkclearly.hub.card import CARD_FILE
from thinkclearly.hub.publish import staged, upload
from thinkclearly.training.trainer import ClearEditTrainer

logger = logging.getLogger(__name__)

CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
_FAILED = "Pushing a checkpoint failed, training goes on: %s"


class PublishingTrainer(ClearEditTrainer):
    """A `ClearEditTrainer` whose `hub_model_id`, `hub_strategy`, `hub_private_repo`, `hub_revision` and `hub_token`
    work as the Trainer's, but which uploads a fine-tune's files and card only: the Trainer would add its arguments,
    logs and whatever else lies in `output_dir`.

    Whole checkpoints, for `hub_strategy: checkpoint` and `all_checkpoints`, go without the arguments' file.
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
        """Puts the files together now, and sends them in the background: what is trained meanwhile stays out."""
        stage = ExitStack()
        folder = stage.enter_context(staged(directory, self.hub_model_id, share_samples=self.args.share_samples))

        def send() -> CommitInfo:
            with stage:
                return upload(
                    folder,
                    self.hub_model_id,
                    revision=revision or self.args.hub_revision,
                    token=token or self.args.hub_token,
                    message=message,
                )

        return run_as_future(send)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        message = f"Training in progress, step {self.state.global_step}"
        try:
            jobs = [self._push(checkpoint_folder, message)]
        except (OSError, ValueError) as error:  # a card that cannot be read, no room in TMPDIR
            return logger.warning(_FAILED, error)
        if self.args.hub_strategy in CHECKPOINTS:
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            whole = upload_folder(
                repo_id=self.hub_model_id,
                token=self.args.hub_token,
                folder_path=checkpoint_folder,
                path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                commit_message=f"{message}, checkpoint",
                revision=self.args.hub_revision,
                ignore_patterns=["training_args.bin", CARD_FILE],
                run_as_future=True,
            )
            jobs.append(whole)
        for job in jobs:
            job.add_done_callback(_tell)
        self.push_in_progress = PushInProgress(jobs)


def _tell(job: Future) -> None:
    """A push in the middle of training that fails is no reason to stop, nor to be silent."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning(_FAILED, job.exception())
