"""Runs that should be equal are, and log what they should."""

import pickle

import numpy as np
import pytest
import torch
from accelerate import DeepSpeedPlugin
from tiny_runs import CODES, POSITIONS, Touch, batch_of, fresh, history, make_trainer, records, trained

from thinkclearly.models.cross_entropy import weighted_loss
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.training.callbacks import TuneClearWeight


def mean_loss(pair, batch):
    """What CLEAR's weight of 0.3 makes of a batch."""
    weights = torch.where(batch["labels"] >= CODES, 0.3, 1.0)
    return weighted_loss(pair[0].eval()(**batch).nll, weights).item()


def test_accumulation_and_batches_train_identically(golden, tmp_path):
    rows = records(golden, 6)  # the second step of four has two records only
    runs = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            fresh(golden),
            rows,
            tmp_path,
            num_train_epochs=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        runs.append((history(trainer, "loss", "grad_norm", "clear_rate_true"), trained(trainer.model)))
    assert len(runs[0][0]) == 4
    for values, weights in runs[1:]:
        np.testing.assert_allclose(values, runs[0][0], rtol=2e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], atol=2e-4, rtol=1e-3)


def test_only_lora_and_head_learn(golden, tmp_path):
    model, processor = pair = fresh(golden)
    names = set(trained(model))
    assert {"clear_head.weight", "clear_head.bias"} <= names
    assert all("lora_" in name or name.startswith("clear_head.") for name in names)
    adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert adapted
    assert not [
        name for name in adapted if any(part in name for part in ("vision_model", "vqmodel", "embed", "aligner"))
    ]
    assert any("generation_head.proj_out" in name for name in adapted)
    assert any("generation_head.vision_head" in name for name in adapted)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in names}
    before = trained(model)
    trainer = make_trainer(pair, records(golden, 4), tmp_path, max_steps=2, drop=(0.0, 0.0))
    trainer.train()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not [name for name in names if torch.equal(after[name], before[name])]


def test_logs_tell_how_the_gate_is_doing(golden, tmp_path):
    pair, rows = fresh(golden), records(golden, 4)
    trainer = make_trainer(
        pair, rows, tmp_path, eval_rows=rows[:3], max_steps=2, eval_strategy="steps", eval_steps=2, drop=(0.0, 0.0)
    )
    trainer.train()
    names = {"clear_rate_true", "clear_rate_predicted", "code_accuracy", "accuracy", "gate_auc"}
    first = next(log for log in trainer.state.log_history if "loss" in log)
    assert names | {"clear_weight", "grad_norm", "learning_rate"} <= set(first)
    evaluation = next(log for log in trainer.state.log_history if "eval_loss" in log)
    assert {f"eval_{name}" for name in names} <= set(evaluation)
    true = np.mean([np.array(row["output_tokens"]) == CODES for row in rows[:3]])
    assert evaluation["eval_clear_rate_true"] == pytest.approx(true)


def test_evaluation_drops_nothing(golden, tmp_path):
    pair, rows = fresh(golden, lora_dropout=0.5), records(golden, 3)
    trainer = make_trainer(pair, rows, tmp_path, eval_rows=rows, drop=(1.0, 1.0), per_device_eval_batch_size=3)
    found = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    batch = batch_of(pair, rows)
    with torch.no_grad():
        expected = mean_loss(pair, batch)
    assert found == pytest.approx([expected, expected], rel=1e-5)
    trainer.clear_weight = 0.9  # a moving weight must not make evaluation losses incomparable
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_is_the_same_for_any_batch_size(golden, tmp_path):
    pair, rows = fresh(golden), records(golden, 5)
    rows[4]["output_tokens"] = [CODES] * POSITIONS  # records of different weight: a mean of means would tell
    batch = batch_of(pair, rows)
    with torch.no_grad():
        expected = mean_loss(pair, batch)
    found = []
    for size in (1, 2, 5):
        trainer = make_trainer(pair, rows, tmp_path, eval_rows=rows, per_device_eval_batch_size=size)
        values = trainer.evaluate()
        assert values["eval_loss"] == pytest.approx(expected, rel=1e-5)
        names = ("clear_rate_true", "clear_rate_predicted", "code_accuracy", "accuracy", "gate_auc")
        found.append([values[f"eval_{name}"] for name in names])
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-5)


def test_a_loss_that_is_no_number_is_reported_as_such(golden, tmp_path):
    model, _ = pair = fresh(golden)
    with torch.no_grad():
        model.clear_head.bias.fill_(float("nan"))
    trainer = make_trainer(pair, records(golden, 2), tmp_path, eval_rows=records(golden, 2))
    assert np.isnan(trainer.evaluate()["eval_loss"])


def test_weights_are_sharded_under_zero_3_but_not_under_zero_2(golden, tmp_path, monkeypatch):
    trainer = make_trainer(fresh(golden), records(golden, 2), tmp_path)
    assert not trainer.weights_are_sharded
    for stage in (2, 3):
        plugin = DeepSpeedPlugin(zero_stage=stage)
        monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
        assert trainer.weights_are_sharded is (stage == 3)
    trainer.is_fsdp_enabled, plugin.zero_stage = True, 2
    assert trainer.weights_are_sharded


def test_activation_checkpointing_changes_nothing(golden, tmp_path):
    runs = []
    for checkpointing in (False, True):
        pair = fresh(golden)
        trainer = make_trainer(pair, records(golden, 4), tmp_path, max_steps=2, activation_checkpointing=checkpointing)
        trainer.train()
        assert pair[0].base.is_activation_checkpointing is checkpointing
        runs.append(history(trainer, "loss", "grad_norm"))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


@pytest.mark.slow
def test_compiled_training_is_plain_training(golden, tmp_path):
    runs = []
    # aot_eager: all of the compiler but the C++ that inductor would build for minutes.
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = make_trainer(fresh(golden), records(golden, 2), tmp_path, max_steps=2, **options)
        trainer.train()
        runs.append(history(trainer, "loss", "grad_norm"))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-4)
    trainer.save_model()
    assert torch.equal(load_clear_model(tmp_path)[0].clear_head.weight, trainer.model.clear_head.weight)


def test_bf16_trains_close_to_float32(golden, tmp_path):
    runs = []
    for bf16 in (False, True):
        trainer = make_trainer(fresh(golden), records(golden, 4), tmp_path, max_steps=2, bf16=bf16)
        trainer.train()
        runs.append(history(trainer, "loss", "grad_norm"))
    np.testing.assert_allclose(runs[1], runs[0], rtol=0.05)
    assert runs[0] != runs[1]
    assert all(weight.dtype == torch.float32 for weight in trained(trainer.model).values())


def test_the_head_has_its_own_learning_rate(golden, tmp_path):
    pair = fresh(golden)
    trainer = make_trainer(
        pair,
        records(golden, 4),
        tmp_path,
        max_steps=4,
        clear_head_lr=0.5,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
    )
    trainer.train()
    assert [rate for (rate,) in history(trainer, "learning_rate")] == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    head = {id(p) for p in pair[0].clear_head.parameters()}
    groups = [{id(p) for p in group["params"]} for group in trainer.optimizer.param_groups]
    own = [i for i, group in enumerate(groups) if group & head]
    assert len(own) == 1 and groups[own[0]] == head
    assert trainer.lr_scheduler.base_lrs[own[0]] == 0.5
    everything = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(trained(pair[0]))
    trainer.create_optimizer()
    assert len(trainer.optimizer.param_groups) == len(groups), "asking again must not add the head again"


def test_a_resumed_run_ends_bit_identical(golden, tmp_path):
    rows = records(golden, 6)

    def run(folder, seed, resume=None):
        pair = fresh(golden, seed=seed, lora_dropout=0.1)
        trainer = make_trainer(
            pair,
            rows,
            folder,
            eval_rows=rows[:2],
            per_device_train_batch_size=2,  # three steps an epoch: the checkpoint is in the middle of the first
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            lr_scheduler_type="cosine",
            clear_head_lr=1e-2,
        )
        trainer.add_callback(TuneClearWeight(trainer, eta=0.5))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", seed=0)
    marker = tmp_path / "executed"
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Touch(marker)))
    resumed = run(tmp_path / "resumed", seed=7, resume=str(checkpoint))
    assert not marker.exists(), "a pickle of the checkpoint was executed"
    assert resumed.clear_weight == whole.clear_weight != 0.3
    expected = trained(whole.model)
    for name, weight in trained(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
    assert history(resumed, "loss", "grad_norm") == history(whole, "loss", "grad_norm")
