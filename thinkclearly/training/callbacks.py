"""What watches a run from the side: weight tuning, collapse alarm, speed, samples, SIGTERM, the dropout's epoch."""

from __future__ import annotations

import logging
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import reduce
from PIL import Image
from transformers import TrainerCallback

from thinkclearly.data.collator import Collator
from thinkclearly.files import replacing

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

logger = logging.getLogger(__name__)


class EpochOfDropout(TrainerCallback):
    """Tells the collator which epoch it is in, so that a record is dropped anew each time it is seen."""

    def __init__(self, collator: Collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch.fill_(int(state.epoch or 0))


class TuneClearWeight(TrainerCallback):
    """The original's auto-tuning: copying too often lowers the class weight of instructions, too rarely raises it.

    After each evaluation, weight ← clip(weight − eta·(predicted rate − true rate), lowest, highest), the rates being
    those of all instructions together, which share the weight.

    Args:
        trainer: whose `clear_weight` is moved.
        eta, lowest, highest: the values of the original's `main`.
    """

    def __init__(self, trainer, eta: float = 0.1, lowest: float = 0.1, highest: float = 1.0):
        self.trainer, self.eta, self.lowest, self.highest = trainer, eta, lowest, highest

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        predicted = [name for name in metrics or () if name.endswith("_rate_predicted")]
        if predicted:
            excess = sum(metrics[name] - metrics[name.replace("_predicted", "_true")] for name in predicted)
            moved = self.trainer.clear_weight - self.eta * excess
            self.trainer.clear_weight = min(self.highest, max(self.lowest, moved))


class CollapseAlarm(TrainerCallback):
    """Stops a run whose loss is gone: accuracy 1.0 at loss 0 means that the answer leaks into the input.

    Reported for Janus-4o's own training (ShareGPT-4o-Image issue 6: blank pictures afterwards). `step` tells when.
    """

    def __init__(self):
        self.step: int | None = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and logs.get("loss", 1.0) < 1e-4 and logs.get("accuracy", 0.0) > 0.9999:
            logger.error(
                "Step %d: loss %.2g and accuracy %.4f. The model has collapsed or sees its own targets; training "
                "stops. Look at the labels (thinkclearly prepare writes a sheet) and lower the learning rate.",
                state.global_step,
                logs["loss"],
                logs["accuracy"],
            )
            self.step, control.should_training_stop = state.global_step, True


class SaveOnSigterm(TrainerCallback):
    """Finishes the step that SIGTERM comes in, saves it and stops the training; `stopped` tells afterwards.

    transformers' `enable_jit_checkpoint` saves in the middle of a step, which does not resume bit for bit.
    """

    def __init__(self):
        self.asked = self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number, frame):
        self.asked = True

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped = self.asked
        if args.world_size > 1:  # all processes save the same step, whichever of them was asked
            self.stopped = bool(reduce(torch.tensor(float(self.asked), device=args.device)))
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous)


class Speed(TrainerCallback):
    """Time of the optimizer steps, data loading included, evaluation and saving not; the first one warms up."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.last)
        self._start()

    def _start(self, *args, **kwargs):
        self.last = time.perf_counter()

    on_train_begin = on_evaluate = on_save = _start

    def metrics(self, args) -> dict[str, float]:
        """`seconds_per_step`, `samples_per_second` over all processes, and `peak_memory_gib` of this process.

        The last one is left out on Windows without CUDA.
        """
        found = {}
        if args.device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        elif resource is not None:
            # Linux counts kilobytes, macOS bytes.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            found["peak_memory_gib"] = peak / 2**30
        if self.seconds:
            mean = statistics.fmean(self.seconds[1:] or self.seconds)
            samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            found |= {"seconds_per_step": mean, "samples_per_second": samples / mean}
        return found


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
        with replacing(Path(args.output_dir) / "samples" / f"step_{state.global_step:06d}.png") as temporary:
            picture.save(temporary, format="PNG")
