"""One training run of any method: prepare, train or go on training, let the method finish, evaluate, save, push.

Knows what makes two runs the same and in which order things are saved. Does not know what is learnt.
"""

from __future__ import annotations

import hashlib
import logging
import signal
from pathlib import Path

import yaml
from transformers import Trainer, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from thinkclearly.data.splits import PreparedData
from thinkclearly.files import is_local, write_text
from thinkclearly.hub.card import RECIPE_FILE, write_card
from thinkclearly.hub.trainer import PublishingTrainer
from thinkclearly.models.folder import resolve
from thinkclearly.models.load import Checkpoint
from thinkclearly.training.callbacks import CollapseAlarm, SaveOnSigterm, Speed
from thinkclearly.training.checkpoints import EarlierRun, start_over
from thinkclearly.training.options import Options, effective_recipe
from thinkclearly.training.runs import RUN_FILE, data_fingerprint, describe_run
from thinkclearly.training.setup import build_checkpoint

logger = logging.getLogger(__name__)


def train(options: Options, method) -> list[dict]:
    """Prepares what is not prepared, trains (going on from the last checkpoint), evaluates and saves.

    Args:
        method: a module with `Trainer`, `read_data`, `build` and `finish`; see `training.clear`.

    Returns:
        What was logged. A run that has come to its end already is left as it is.

    Raises:
        ValueError: `output_dir` holds a run that was trained in another way; see `training.runs`.
    """
    training, model = options.training, options.model
    if training.push_to_hub and options.lora.lora_r and is_local(model.base_model):
        raise ValueError(
            f"push_to_hub: nobody else can load the adapter's base {model.base_model}. Give a Hub id as base_model, "
            "or leave push_to_hub out and then use `thinkclearly push DIR --base_model_id owner/name`."
        )
    output = Path(training.output_dir)
    run = describe_run(training, (model, options.lora, options.data, options.method), options.settings)
    earlier = EarlierRun(training)
    earlier.check(run)  # what needs no model and no data to be refused
    set_seed(training.seed)
    checkpoint = build_checkpoint(model)
    data = method.read_data(options, checkpoint)
    run.fingerprints = _fingerprints(checkpoint, data, run.options["base_model"], options.lora.adapter)
    if earlier.is_finished(run):
        logger.info("%s: this run has come to its end already; there is nothing to do", output)
        return TrainerState.load_from_json(str(output / TRAINER_STATE_NAME)).log_history
    earlier.go_on_as(run)
    if data.test is None:
        training.eval_strategy = "no"
    kind = type(f"Publishing{method.Trainer.__name__}", (PublishingTrainer, method.Trainer), {})
    trainer = method.build(options, checkpoint, data, kind)
    sigterm, speed, alarm = SaveOnSigterm(), Speed(), CollapseAlarm()
    for callback in (alarm, sigterm, speed):
        trainer.add_callback(callback)
    recipe = effective_recipe(options)
    trainer.run_files = {RUN_FILE: run.to_json(), RECIPE_FILE: yaml.safe_dump(recipe, sort_keys=False)}
    if trainer.is_world_process_zero():
        if training.overwrite_output_dir:
            start_over(output)
        (output / RUN_FILE).unlink(missing_ok=True)  # it comes back at the end
    result = trainer.train(resume_from_checkpoint=earlier.checkpoint and str(earlier.checkpoint))
    if sigterm.stopped:
        logger.warning("SIGTERM: step %d is done and saved; the same command goes on", trainer.state.global_step)
        raise SystemExit(128 + signal.SIGTERM)
    if alarm.step is not None:
        raise ValueError(f"The loss collapsed at step {alarm.step}; nothing is saved or pushed beyond the checkpoints")
    _finish(trainer, method, data, result.metrics | speed.metrics(training))
    return trainer.state.log_history


def _finish(trainer: Trainer, method, data: PreparedData, metrics: dict[str, float]) -> None:
    """Saves what was trained, lets the method finish, evaluates, pushes; `RUN_FILE` says at last that all is there."""
    output = Path(trainer.args.output_dir)
    trainer.save_model(_internal_call=True)  # what is pushed is the end, with its metrics
    if trainer.is_world_process_zero():
        write_text(output / RECIPE_FILE, trainer.run_files[RECIPE_FILE])
    metrics |= method.finish(trainer, data)
    if data.test is not None:
        metrics |= trainer.evaluate()
    trainer.log_metrics("all", metrics)
    trainer.save_metrics("all", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_card(output, trainer.args.hub_model_id)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        write_text(output / RUN_FILE, trainer.run_files[RUN_FILE])


def _fingerprints(checkpoint: Checkpoint, data: PreparedData, base_model: str, adapter: str | None) -> dict[str, str]:
    """What the options name, as it is now."""
    family = checkpoint.token_model
    parts = {"training data": data.train, "held-out data": data.test}
    found = {name: data_fingerprint(rows) for name, rows in parts.items() if rows is not None}
    base = {"base model": family.base_fingerprint() or base_model, "codebook": family.codebook_fingerprint()}
    if adapter:
        weights = next(resolve(adapter).glob("adapter_model.*"))
        base["adapter"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    return base | found
