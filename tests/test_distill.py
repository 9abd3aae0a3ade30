"""`method: distill`: one row learns what guided rows draw."""

import json

import pytest
import torch
import torch.nn.functional as F

from thinkclearly import cli
from thinkclearly.data.pairs import shape_pairs
from thinkclearly.decoding.guidance import guide
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.settings import EditSettings
from thinkclearly.generation.draw import draw, to_pictures
from thinkclearly.models.finetunes import TINY_CLEAR, load_any, load_base
from thinkclearly.sequence import FULL, UNCOND
from thinkclearly.training.distill import DistillArguments, DistillTrainer
from thinkclearly.training.options import RunArguments

PAIRS = shape_pairs(2, "train", seed=3, shapes=1)


def make_trainer(tmp_path, weight, **options):
    model, processor = load_base("tiny")
    model.base.model.generation_head.requires_grad_(True)
    args = RunArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, eval_strategy="no")
    return DistillTrainer(
        model,
        processor=processor,
        grpo=DistillArguments(**options),
        settings=EditSettings(cfg_weight=weight),
        rewards={},
        args=args,
        train_dataset=PAIRS,
    )


def rollout_of(trainer):
    return trainer.roll_out(list(PAIRS), 1, 0, lambda key: False)


def test_a_teacher_without_guidance_has_nothing_to_teach_at_the_start(tmp_path):
    trainer = make_trainer(tmp_path, 1.0)
    rollout = rollout_of(trainer)
    loss = trainer.training_step(trainer.model, rollout, torch.tensor(len(rollout)))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(p.grad.abs().max() < 1e-5 for p in trainer.model.parameters() if p.requires_grad)


def test_the_loss_is_the_divergence_of_what_both_would_draw_from(tmp_path):
    trainer = make_trainer(tmp_path, 3.0)
    rollout, model, processor = rollout_of(trainer), trainer.model, trainer.processor
    everything = torch.arange(len(rollout))
    with torch.no_grad():
        logits = model.teacher_forced_logits(**rollout.model_inputs(everything, processor, [FULL, UNCOND]))
        full, empty = logits.unflatten(0, (-1, 2)).unbind(1)
    teacher = F.softmax(guide({FULL: full, UNCOND: empty}, {FULL: 3.0, UNCOND: -2.0}), -1)
    wanted = (teacher * (teacher.clamp(min=1e-30).log() - F.log_softmax(full, -1))).sum(-1)
    loss = trainer.training_step(model, rollout, torch.tensor(len(rollout)))
    assert loss.item() == pytest.approx(wanted.mean().item(), rel=1e-4)
    whole = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    trainer.grpo.rows_per_forward = 3
    trainer.training_step(model, rollout, torch.tensor(len(rollout)))
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], whole, atol=1e-6, rtol=1e-4)


def run(output, *options):
    argv = ["--method", "distill", "--base_model", "tiny", "--source", "shapes", "--limit", "2", "--eval_samples", "2"]
    argv += [
        "--output_dir",
        str(output),
        "--max_steps",
        "3",
        "--per_device_train_batch_size",
        "2",
        "--use_cpu",
        "true",
    ]
    argv += ["--learning_rate", "5e-4", "--lora_dropout", "0", "--logging_steps", "1", "--save_steps", "2", *options]
    cli.main(["train", *argv])
    state = json.loads((output / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def test_what_is_saved_draws_with_one_row(tmp_path):
    losses = run(tmp_path, "--pair_shapes", "1", "--cfg_weight", "2", "--reward_funcs", "shapes")
    assert losses[-1] < 0.9 * losses[0]  # the same prompts in every step
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_rewards/shapes"] > 0
    assert len(list((tmp_path / "samples").glob("step_*.png"))) == 3
    model, processor = load_any(tmp_path)
    settings = Editor(model, processor).settings
    assert settings.cfg_weight == 1 and settings.cfg_weight2 == 0
    drawn = draw(model, processor, ["a red star at the top on a white background"], settings, samples=[(0, 0)])
    assert to_pictures(model, drawn.fed_codes)[0].size == (64, 64)


def test_a_fine_tune_goes_on_and_edits_with_one_row(tmp_path):
    options = ["--task", "edit", "--adapter", str(TINY_CLEAR), "--cfg_weight", "2", "--temperature", "1"]
    losses = run(tmp_path, *options)
    assert losses[-1] < 0.9 * losses[0]  # the same prompts in every step
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    assert log["kl_gate"] == pytest.approx(0, abs=1e-6)  # the gate has no guidance to lose
    editor = Editor(*load_any(tmp_path))
    assert editor.settings.cfg_weight == 1 and editor.model.vocabulary.names == ("CLEAR",)
    before = Editor(*load_any(TINY_CLEAR)).model.clear_config
    assert editor.model.clear_config.gate_bias == before.gate_bias
