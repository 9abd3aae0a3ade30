"""What watches a run from the side does what it says."""

import logging
import runpy
import sys

import pytest
from PIL import Image
from tiny_runs import fresh, make_trainer, records
from transformers import TrainerControl, TrainerState

from thinkclearly.models.cross_entropy import Scores
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.sequence import Dropout
from thinkclearly.training import callbacks
from thinkclearly.training.callbacks import CollapseAlarm, SampleEdits, Speed, TuneClearWeight


@pytest.mark.parametrize(
    ("predicted", "start", "expected"),
    [(0.8, 0.5, 0.47), (0.2, 0.5, 0.53), (1.0, 0.12, 0.1), (0.0, 0.98, 1.0)],
)
def test_clear_weight_follows_the_excess(predicted, start, expected):
    class Holder:
        clear_weight = start

    callback = TuneClearWeight(Holder)
    metrics = {"eval_clear_rate_predicted": predicted, "eval_clear_rate_true": 0.5}
    callback.on_evaluate(None, TrainerState(), TrainerControl(), metrics=metrics)
    assert Holder.clear_weight == pytest.approx(expected)
    callback.on_evaluate(None, TrainerState(), TrainerControl(), metrics={"eval_loss": 1.0})
    assert Holder.clear_weight == pytest.approx(expected), "no rates, no move"


def test_collapse_stops_the_run(golden, tmp_path, caplog):
    class Perfect(InstructionModel):
        """Sees its own targets."""

        def forward(self, labels, **inputs):
            scores = super().forward(labels=labels, **inputs)
            return Scores(scores.nll * 1e-6, labels, labels, scores.gate)

    model, processor = fresh(golden)
    trainer = make_trainer(
        (Perfect(model.network, model.clear_config), processor),
        records(golden, 4),
        tmp_path,
        max_steps=4,
        callbacks=[CollapseAlarm()],
        drop=(0.0, 0.0),
    )
    with caplog.at_level(logging.ERROR, logger="thinkclearly"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert "collapsed" in caplog.text
    control = TrainerControl()
    CollapseAlarm().on_log(None, TrainerState(), control, logs={"loss": 0.3, "accuracy": 1.0})
    assert not control.should_training_stop


def test_sample_edits_are_saved_at_each_evaluation(golden, tmp_path):
    rows = records(golden, 2)
    trainer = make_trainer(
        fresh(golden),
        rows,
        tmp_path,
        eval_rows=rows,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[SampleEdits(lambda: Image.new("RGB", (8, 8)))],
    )
    trainer.train()
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["step_000001.png", "step_000002.png"]


def test_speed_is_known_where_the_system_tells_no_peak_memory(golden, tmp_path, monkeypatch):
    speed = Speed()
    trainer = make_trainer(fresh(golden), records(golden, 4), tmp_path, max_steps=2, callbacks=[speed])
    trainer.train()
    assert speed.metrics(trainer.args).keys() == {"seconds_per_step", "samples_per_second", "peak_memory_gib"}
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    there = runpy.run_path(callbacks.__file__)["Speed"]
    assert there.metrics(speed, trainer.args).keys() == {"seconds_per_step", "samples_per_second"}


def test_dropout_is_drawn_anew_each_epoch(golden, tmp_path):
    pair, rows = fresh(golden), records(golden, 8)
    trainer = make_trainer(pair, rows, tmp_path, num_train_epochs=2, per_device_train_batch_size=8, drop=(0.3, 0.5))
    seen = []

    class Watched(Dropout):
        def row(self, sample, key, epoch):
            seen.append((epoch, key, super().row(sample, key, epoch).withheld))
            return super().row(sample, key, epoch)

    trainer.data_collator.dropout = Watched(0.3, 0.5, seed=3)
    trainer.train()
    epochs = [{key: value for number, key, value in seen if number == epoch} for epoch in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == 8 and epochs[0] != epochs[1]
