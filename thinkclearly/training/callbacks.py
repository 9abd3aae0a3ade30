"""What watches a run from the side: weight auto-tuning, collapse alarm, sample edits, and the epoch of the dropout."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from transformers import TrainerCallback

from thinkclearly.data.collator import EditCollator

logger = logging.getLogger(__name__)


class EpochOfDropout(TrainerCallback):
    """Tells the collator which epoch it is in, so that a record is dropped anew each time it is seen."""

    def __init__(self, collator: EditCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch.fill_(int(state.epoch or 0))


class TuneClearWeight(TrainerCallback):
    """The original's auto-tuning: predicting CLEAR too often lowers its class weight, too rarely raises it.

    After each evaluation, weight ← clip(weight − eta·(predicted rate − true rate), lowest, highest).

    Args:
        trainer: whose `clear_weight` is moved.
        eta, lowest, highest: the values of the original's `main`.
    """

    def __init__(self, trainer, eta: float = 0.1, lowest: float = 0.1, highest: float = 1.0):
        self.trainer, self.eta, self.lowest, self.highest = trainer, eta, lowest, highest

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics and "eval_clear_rate_predicted" in metrics:
            excess = metrics["eval_clear_rate_predicted"] - metrics["eval_clear_rate_true"]
            moved = self.trainer.clear_weight - self.eta * excess
            self.trainer.clear_weight = min(self.highest, max(self.lowest, moved))


class CollapseAlarm(TrainerCallback):
    """Stops a run whose loss is gone: accuracy 1.0 at loss 0 means that the answer leaks into the input.

    Reported for Janus-4o's own training (ShareGPT-4o-Image issue 6: blank pictures afterwards).
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and logs.get("loss", 1.0) < 1e-4 and logs.get("accuracy", 0.0) > 0.9999:
            logger.error(
                "Step %d: loss %.2g and accuracy %.4f. The model has collapsed or sees its own targets; training "
                "stops. Look at the labels (thinkclearly prepare writes a sheet) and lower the learning rate.",
                state.global_step,
                logs["loss"],
                logs["accuracy"],
            )
            control.should_training_stop = True


class SampleEdits(TrainerCallback):
    """Saves a picture of sample edits at each evaluation, as `samples/step_XXXXXX.png` of the output folder.

    Args:
        draw: makes the picture with the model as it is.
    """

    def __init__(self, draw: Callable[[], Image.Image]):
        self.draw = draw

    def on_evaluate(self, args, state, control, **kwargs):
        picture = self.draw()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{state.global_step:06d}.png"
        picture.save(path.with_suffix(".tmp"), format="PNG")
        os.replace(path.with_suffix(".tmp"), path)
