"""After calibration the gate's log-odds can be taken at their word; each preference moves them the way it says."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from thinkclearly import load_editor
from thinkclearly.data import sources
from thinkclearly.data.collator import Collator
from thinkclearly.data.options import DataArguments
from thinkclearly.data.splits import PreparedData, build_data
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.calibration import calibrate, fit_gate, gate_metrics
from thinkclearly.images import Letterbox
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.models.folder import TINY
from thinkclearly.models.instruction_head import CONFIG_FILE, read_clear_config, write_clear_config
from thinkclearly.models.load import Checkpoint
from thinkclearly.training import clear as clear_method
from thinkclearly.training.options import RunArguments


def test_the_fit_finds_the_bias_and_temperature_that_were_put_in():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(1, 4, 40_000)
    clear = rng.random(40_000) < 1 / (1 + np.exp(-(log_odds - 1.5) / 2.5))
    bias, temperature = fit_gate(log_odds, clear)
    assert bias == pytest.approx(-1.5, abs=0.1) and temperature == pytest.approx(2.5, abs=0.1)
    assert gate_metrics((log_odds + bias) / temperature, clear)["ece"] < 0.01 < gate_metrics(log_odds, clear)["ece"]


def test_classes_without_overlap_do_not_run_to_infinity():
    log_odds = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    bias, temperature = fit_gate(log_odds, log_odds > 0)
    assert math.isfinite(bias) and temperature > 0.1


def test_a_gate_that_knows_nothing_is_not_fitted():
    log_odds, truth = np.linspace(-3, 3, 500), np.random.default_rng(0).random(500) < 0.9
    for clear, auc in ((log_odds < 0, "0.00"), (truth, "0.5")):
        with pytest.raises(ValueError, match=f"hardly tells what is unchanged: AUC {auc}"):
            fit_gate(log_odds, clear)
    with pytest.raises(ValueError, match="AUC 0.50"):
        fit_gate(np.zeros(500), truth)


def test_one_class_alone_cannot_be_fitted():
    with pytest.raises(ValueError, match="4 CLEAR and 0 other positions"):
        fit_gate(np.zeros(4), np.ones(4, bool))


def test_metrics_by_hand():
    # Two positions at 0.5, one of them CLEAR: honest. Two at 0.9 (log 9), one CLEAR: 0.4 too sure.
    log_odds, clear = np.array([0.0, 0.0, math.log(9), math.log(9)]), np.array([True, False, True, False])
    assert gate_metrics(log_odds, clear)["ece"] == pytest.approx((0 + 0.4) / 2, abs=1e-6)
    # Probabilities of both are 1.0 to the last bit, their order still counts.
    assert gate_metrics(np.array([50.0, 60.0, 70.0]), np.array([False, True, True]))["auc"] == 1
    assert gate_metrics(np.array([70.0, 60.0]), np.array([False, True]))["auc"] == 0
    assert gate_metrics(np.zeros(2), np.zeros(2, bool))["auc"] is None
    assert gate_metrics(np.zeros(0), np.zeros(0, bool)) == {"auc": None, "ece": None}


@pytest.fixture
def editor():
    return Editor(*load_clear_model(TINY.parent / "tiny_clear"))


@pytest.fixture(scope="module")
def rows():
    """Held-out edits whose truth is the mask, but for one patch in ten: the gate is too sure of itself."""
    rng, found = np.random.default_rng(0), []
    for row in sources.shapes(6, size=64, seed=3, split="test"):
        example = sources.read_example(row)
        clear = ~Letterbox(*example.source.size, 64).fit_mask(example.mask, 8).ravel() ^ (rng.random(64) < 0.1)
        labels = np.where(clear, 1024, 0)
        found.append({"source": example.source, "instruction": example.instruction, "output_tokens": labels})
    return found


def test_calibrating_changes_what_the_model_copies(editor, rows):
    config = editor.model.clear_config
    before = config.gate_bias, config.gate_temperature
    found = calibrate(editor, rows, batch_size=4)
    assert (config.gate_bias, config.gate_temperature) == (found["gate_bias"], found["gate_temperature"]) != before
    assert found["gate_ece_after"] < found["gate_ece_before"]
    again = calibrate(editor, rows, batch_size=6)
    assert again["gate_bias"] == pytest.approx(found["gate_bias"], rel=1e-3)  # starts from the gate as it was trained


def test_a_gate_that_cannot_be_fitted_stays_as_it_is(editor, rows):
    config, rng = editor.model.clear_config, np.random.default_rng(0)
    as_it_is = config.gate_bias, config.gate_temperature = 1.25, 2.5
    random = [row | {"output_tokens": np.where(rng.random(64) < 0.8, 1024, 0)} for row in rows]
    with pytest.raises(ValueError, match="hardly tells what is unchanged"):
        calibrate(editor, random)
    assert (config.gate_bias, config.gate_temperature) == as_it_is


def test_training_stores_what_it_found(editor, tmp_path, caplog):
    """On a model that is trained already: what training leaves in memory and in its folder."""
    config = editor.model.clear_config
    rows = build_data(
        DataArguments(calibration_edits=6, prepared_dir=str(tmp_path / "data")),
        Checkpoint(editor.model.base, editor.processor),
        ["calibration"],
    ).calibration
    args = RunArguments(output_dir=str(tmp_path / "run"), eval_strategy="no", per_device_eval_batch_size=3)
    collator = Collator(editor.processor, editor.model.vocabulary)
    trainer = clear_method.ClearEditTrainer(
        editor.model,
        clear_weight=config.clear_weight,
        processor=editor.processor,
        data_collator=collator,
        args=args,
    )
    trainer.save_model()
    config.gate_bias = 5.0
    found = clear_method.finish(trainer, PreparedData(calibration=rows))
    saved = read_clear_config(tmp_path / "run")
    assert saved == config and saved.gate_bias == found["gate_bias"] != 5.0
    caplog.clear()
    bare = PreparedData(calibration=rows.remove_columns("source"))
    assert clear_method.finish(trainer, bare) == {}
    assert "The gate stays uncalibrated: no held-out records with pictures" in caplog.text


@pytest.mark.parametrize("name", ["gate_temperature", "gate_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None])
def test_a_damaged_calibration_is_refused(editor, tmp_path, name, value):
    write_clear_config(replace(editor.model.clear_config, **{name: value}), tmp_path)
    with pytest.raises(ValueError, match=name):
        read_clear_config(tmp_path)


def test_a_fine_tune_of_before_calibration_is_read(editor, tmp_path):
    write_clear_config(editor.model.clear_config, tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    del content["gate_bias"], content["gate_temperature"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    assert (read_clear_config(tmp_path).gate_bias, read_clear_config(tmp_path).gate_temperature) == (0, 1)


def test_merged_in_float32_only_and_with_the_same_tokens(editor, rows):
    def merged(model):
        return {module.merged for module in model.modules() if hasattr(module, "merged")}

    folded = load_editor(str(TINY.parent / "tiny_clear"))
    assert (merged(editor.model), merged(folded.model)) == ({False}, {True})
    half = load_editor(str(TINY.parent / "tiny_clear"), dtype=torch.bfloat16)
    assert merged(half.model) == {False}
    for row in rows[:3]:
        ids = [e.edit(row["source"], row["instruction"]).class_ids for e in (editor, folded)]
        assert torch.equal(*ids)


def test_log_odds_are_calibrated_then_shifted_by_preference_and_bias(editor, rows):
    config = editor.model.clear_config
    source, words = rows[0]["source"], rows[0]["instruction"]

    def first(**settings):
        """Before anything was decided: later positions depend on the decisions."""
        return editor.edit(source, words, **settings).gate[0].item()

    config.gate_bias, config.gate_temperature = 0.0, 1.0
    plain = first()
    config.gate_bias, config.gate_temperature = -1.5, 2.0
    calibrated = (plain - 1.5) / 2
    assert first() == pytest.approx(calibrated, abs=1e-4)
    assert first(clear_bias=0.7) == pytest.approx(calibrated + 0.7, abs=1e-4)
    assert first(prefer="edit") == pytest.approx(calibrated - math.log(10), abs=1e-4)
    assert first(prefer="exact", clear_bias=-0.2) == pytest.approx(calibrated + math.log(10) - 0.2, abs=1e-4)


def test_the_more_exactness_is_preferred_the_more_is_copied(editor, rows):
    editor.model.clear_config.gate_temperature = 4.0  # an unsure gate, so that preferences tell
    shares = [
        np.mean([editor.edit(r["source"], r["instruction"], prefer=p).clear_fraction for r in rows])
        for p in ("edit", "balanced", "exact")
    ]
    assert shares[0] < shares[1] < shares[2]


def test_an_unknown_preference_is_named(editor, rows):
    with pytest.raises(ValueError, match="prefer='speed'; choose from edit, balanced, exact"):
        editor.edit(rows[0]["source"], "Make it red.", prefer="speed")
