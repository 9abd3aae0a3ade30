"""`method: interleaved` trains words, pictures and their reconstruction; runs that should be equal are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN_ROOT
from datasets import concatenate_datasets
from real_runs import results, run_and_kill
from safetensors.torch import load_file
from tiny_runs import history, trained

from thinkclearly import cli
from thinkclearly.data.interleaved import tokenize_thoughts
from thinkclearly.data.streams import StreamCollator, StreamDropout
from thinkclearly.data.thoughts import thought_rows
from thinkclearly.models.finetunes import load_any, load_finetune
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.load import load_checkpoint
from thinkclearly.models.stream import StreamModel
from thinkclearly.training.adapters import add_lora
from thinkclearly.training.callbacks import EpochOfDropout
from thinkclearly.training.interleaved import InterleavedArguments, StreamTrainer
from thinkclearly.training.options import RunArguments

ROOT = Path(__file__).parents[1]
BASE = GOLDEN_ROOT / "chameleon_tiny" / "checkpoint"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not BASE.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]
CLEAR_WEIGHT, LAMBDA = 0.3, 0.5


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Streams of all kinds: two critiques, two of sub-goals, one picture at once, one of words alone."""
    checkpoint = load_checkpoint(str(BASE))
    side = checkpoint.processor.image_size
    made = [thought_rows(mode, n, seed=1, size=side, wrong=1.0) for mode, n in zip(MODES, (2, 2, 1))]
    words = made[-1].map(lambda row: {"key": "words", "response": "A star.", "images": [], "edit_of": []})
    streams, _ = tokenize_thoughts(
        concatenate_datasets([*made, words]), checkpoint, tmp_path_factory.mktemp("prepared")
    )
    return streams


MODES = ("critique", "subgoals", "general")


def fresh(instructions=("CLEAR",), at="next"):
    """A model to train; its LoRA and its CLEAR head are not at their neutral start."""
    torch.manual_seed(0)
    checkpoint = load_checkpoint(str(BASE))
    config = ClearConfig(checkpoint.token_model.codebook_size, [*instructions], CLEAR_WEIGHT)
    model = StreamModel.of(add_lora(checkpoint, str(BASE), config, r=4, lora_alpha=8, lora_dropout=0.0), at)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "clear_head.weight":
                parameter.normal_(std=0.05)
    return model, checkpoint.processor


def make_trainer(pair, rows, folder, *, drop=(0.0, 0.0, 0.0), eval_rows=None, **options):
    model, processor = pair
    collator = StreamCollator(processor, model.vocabulary, StreamDropout(*drop, seed=3))
    defaults = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "learning_rate": 1e-3}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "method": "interleaved"}
    return StreamTrainer(
        model=model,
        processor=processor,
        reconstruction_weight=LAMBDA,
        instruction_weight=CLEAR_WEIGHT,
        data_collator=collator,
        args=RunArguments(output_dir=str(folder), **(defaults | options)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        callbacks=[EpochOfDropout(collator)],
    )


@torch.no_grad()
def plain_loss(pair, rows):
    """Loss, cross-entropy and reconstruction, record by record from transformers' own model."""
    model, processor = pair[0].eval(), pair[1]
    network, n, k = model.base, processor.num_image_tokens, len(processor.code_ids)
    code_of = {token: code for code, token in enumerate(processor.code_ids)}
    total = weights = error = elements = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        hidden = network.model(input_ids=ids).last_hidden_state[0]
        logits = network.lm_head(hidden)
        edited = {
            place: row["copied"][number * n + i]
            for number, start in enumerate(row["picture_starts"])
            if row["edit_of"][number] >= 0 and len(model.vocabulary)
            for i, place in enumerate(range(start, start + n))
        }
        for place in range(row["response_start"], ids.shape[1]):
            label, weight, scores = ids[0, place], 1.0, logits[place - 1]
            if place in edited:
                scores = torch.cat([scores[processor.code_ids], model.clear_head(hidden[place - 1])])
                label = torch.tensor(k if edited[place] else code_of[label.item()])
                weight = CLEAR_WEIGHT if edited[place] else 1.0
            total, weights = total + weight * F.cross_entropy(scores, label).item(), weights + weight
        for start in [place for place in row["picture_starts"] if place >= row["response_start"]]:  # not the given
            codes = torch.tensor([code_of[token] for token in row["input_ids"][start : start + n]])
            wanted = network.model.vqmodel.quantize.embedding(codes)
            found = model.projection(hidden[start - model.shift : start - model.shift + n])
            error, elements = error + (found - wanted).square().sum().item(), elements + wanted.numel()
    ce, reconstruction = total / weights, error / max(1, elements)
    return ce + LAMBDA * reconstruction, ce, reconstruction


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instructions", [(), ("CLEAR",)], ids=["plain", "clear"])
@pytest.mark.parametrize("at", ["next", "own"])
def test_a_step_trains_on_the_means_over_its_ids_and_over_its_pictures(rows, tmp_path, instructions, at):
    pair = fresh(instructions, at)
    expected, before = plain_loss(pair, rows.to_list()), trained(pair[0])
    assert len({len(row["input_ids"]) for row in rows}) > 3, "padding is among it"
    trainer = make_trainer(pair, rows, tmp_path, max_steps=1, per_device_train_batch_size=6, eval_rows=rows)
    values = trainer.evaluate()
    trainer.train()
    logged = history(trainer, "loss", "ce", "reconstruction")[0]
    assert logged == pytest.approx(expected, rel=1e-5)
    assert [values[f"eval_{name}"] for name in ("loss", "ce", "reconstruction")] == pytest.approx(expected, rel=1e-5)
    after = trained(pair[0])
    idle = [name for name, value in after.items() if value.numel() and torch.equal(value, before[name])]
    assert not idle and {"projection.weight", "projection.bias"} <= after.keys()


def test_records_of_words_alone_train_without_a_reconstruction(rows, tmp_path):
    pair, words = fresh(), rows.select([5])
    expected = plain_loss(pair, words.to_list())
    assert words[0]["picture_starts"] == [] and expected[2] == 0
    trainer = make_trainer(pair, words, tmp_path, max_steps=1, eval_rows=words)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[0], rel=1e-5)
    trainer.train()
    assert history(trainer, "loss")[0][0] == pytest.approx(expected[0], rel=1e-5)


def test_accumulation_and_batches_train_identically(rows, tmp_path):
    runs = []
    for size, accumulation in ((3, 1), (1, 3)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 4}
        trainer = make_trainer(fresh(), rows, tmp_path, drop=(0.2, 0.2, 0.2), **options)
        trainer.train()
        names = ("loss", "grad_norm", "ce", "reconstruction", "accuracy", "code_accuracy", "clear_rate_true")
        runs.append((history(trainer, *names), trained(trainer.model)))
    assert len(runs[0][0]) == 4
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=2e-4)
    for name, weight in runs[1][1].items():
        torch.testing.assert_close(weight, runs[0][1][name], atol=2e-4, rtol=1e-3)


def test_evaluation_is_the_same_for_any_batch_size_and_drops_nothing(rows, tmp_path):
    pair, found = fresh(), []
    expected = plain_loss(pair, rows.to_list())
    for size in (1, 4, 6):
        options = {"eval_rows": rows, "drop": (0.5, 0.0, 0.5), "per_device_eval_batch_size": size}
        trainer = make_trainer(pair, rows, tmp_path, **options)
        values = trainer.evaluate()
        assert values["eval_loss"] == pytest.approx(expected[0], rel=1e-5)
        found.append([values[f"eval_{name}"] for name in StreamTrainer.train_mean_names])
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-5)
    n = pair[1].num_image_tokens
    edited = [row["copied"][k * n : (k + 1) * n] for row in rows for k, e in enumerate(row["edit_of"]) if e >= 0]
    assert found[0][4] == pytest.approx(np.mean(edited))


def test_lambda_weighs_the_reconstruction_and_0_leaves_it_out(rows, tmp_path):
    pair = fresh()
    _, ce, reconstruction = plain_loss(pair, rows.to_list())
    for weight in (0.0, 2.0):
        trainer = make_trainer(pair, rows, tmp_path, eval_rows=rows)
        trainer.reconstruction_weight = weight
        assert trainer.evaluate()["eval_loss"] == pytest.approx(ce + weight * reconstruction, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"reconstruction_at": "after"}, {"reconstruction_weight": -1.0}, {"drop_all": 0.6, "drop_words": 0.6},
     {"drop_context": -0.1}, {"clear_weight": 0.0}],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        InterleavedArguments(**wrong)


# ---- what is saved -----------------------------------------------------------------------------------------------


def test_the_projection_is_read_back_by_training_and_left_alone_by_inference(rows, tmp_path):
    pair = fresh()
    trainer = make_trainer(pair, rows, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    model, _ = fresh()
    assert not torch.equal(model.projection.weight, pair[0].projection.weight)
    load_finetune(model, tmp_path)
    assert all(torch.equal(value, trained(pair[0])[name]) for name, value in trained(model).items())
    loaded, _ = load_any(str(tmp_path))
    assert type(loaded) is InstructionModel and torch.equal(loaded.clear_head.weight, pair[0].clear_head.weight)
    (tmp_path / "reconstruction.safetensors").unlink()
    load_any(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no reconstruction.safetensors: no run of method interleaved"):
        load_finetune(fresh()[0], tmp_path)


# ---- the command -------------------------------------------------------------------------------------------------


def flags(options):
    found = []
    for name, value in options.items():
        found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A recipe on the reference base."""
    options = {"method": "interleaved", "base_model": BASE, "source": "shapes", "thought_mode": [*MODES]}
    options |= {"prepared_dir": tmp_path_factory.mktemp("prepared"), "limit": 10, "eval_samples": 5, "lora_r": 4}
    options |= {"calibration_edits": 6, "lora_dropout": 0.1, "instructions": "CLEAR", "drop_all": 0.2}
    options |= {"drop_words": 0.2, "clear_weight": CLEAR_WEIGHT, "reconstruction_weight": LAMBDA, "max_steps": 4}
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "save_steps": 2, "eval_steps": 4}
    return options | {"logging_steps": 1, "learning_rate": 1e-3, "use_cpu": "true"}


@pytest.fixture(scope="module")
def finetune(settings, one_thread, tmp_path_factory):
    """What the command leaves."""
    folder = tmp_path_factory.mktemp("run") / "model"
    cli.main(["train", *flags(settings | {"output_dir": folder})])
    return folder


def test_a_run_that_is_killed_goes_on_by_the_same_command_and_ends_bit_identical(settings, finetune, tmp_path):
    argv = ["train", *flags(settings | {"output_dir": tmp_path})]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run_and_kill(argv, 3, environment)
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "adapter_model.safetensors").exists()
    cli.main(argv)
    for name in ("adapter_model.safetensors", "reconstruction.safetensors", "gen_head_clear.safetensors"):
        assert (tmp_path / name).read_bytes() == (finetune / name).read_bytes(), name
    assert results(tmp_path)["eval_loss"] == results(finetune)["eval_loss"]


def test_a_full_fine_tune_goes_on_too_and_leaves_the_tokenizer_alone(settings, one_thread, tmp_path):
    options = settings | {"lora_r": 0, "instructions": [], "lr_scheduler_type": "constant", "lora_dropout": 0.05}
    del options["instructions"]
    for name, ends in (("whole", [3]), ("parts", [2, 3])):
        for steps in ends:
            cli.main(["train", *flags(options | {"max_steps": steps, "output_dir": tmp_path / name})])
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    base = load_file(BASE / "model.safetensors")
    assert whole.keys() == base.keys() == parts.keys(), "the decoder is there"
    for key, value in whole.items():
        assert torch.equal(value, parts[key]) and torch.equal(value, base[key]) is ("vqmodel" in key), key
    projections = [load_file(tmp_path / name / "reconstruction.safetensors") for name in ("whole", "parts")]
    assert torch.equal(projections[0]["weight"], projections[1]["weight"])
    load_any(str(tmp_path / "whole"))


def launch(config, folder, *jobs):
    """`accelerate launch` of training jobs one after the other, with two processes."""
    script = folder / "several.py"
    lines = [f"cli.start('train', {list(map(str, flags(options)))!r})\n" for options in jobs]
    script.write_text("from thinkclearly import cli\n" + "".join(lines))
    command = [
        Path(sys.executable).parent / "accelerate",
        "launch",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command += ["--config_file", ROOT / "recipes" / "accelerate" / f"{config}.yaml", script]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stderr


def losses_of(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [
        [log[name] for name in ("loss", "grad_norm", "ce", "reconstruction")]
        for log in state["log_history"]
        if "loss" in log
    ]


def assert_same_run(found, expected):
    np.testing.assert_allclose(losses_of(found), losses_of(expected), rtol=2e-4)
    for name in ("loss", "ce", "reconstruction", "accuracy", "code_accuracy", "clear_rate_true"):
        assert results(found).get(f"eval_{name}") == pytest.approx(results(expected).get(f"eval_{name}"), rel=1e-4), (
            name
        )
    for name in ("adapter_model.safetensors", "model.safetensors", "reconstruction.safetensors"):
        assert (found / name).is_file() == (expected / name).is_file()
        if (found / name).is_file():
            weights, others = load_file(found / name), load_file(expected / name)
            assert weights.keys() == others.keys()
            for key, weight in weights.items():
                # Adam turns the rounding of gradients near zero into whole steps of single weights.
                assert (weight - others[key]).norm() <= 0.01 * others[key].norm() + 1e-6, key


@pytest.fixture(scope="module")
def one_process(settings, one_thread, tmp_path_factory):
    """Batches of 4 in this process, with LoRA and without."""
    runs = {}
    for name, options in {"lora": {}, "full": {"lora_r": 0}}.items():
        runs[name] = settings | options | {"lora_dropout": 0.0, "max_steps": 3, "eval_steps": 3, "limit": 12}
        folder = tmp_path_factory.mktemp(name)
        cli.main(["train", *flags(runs[name] | {"per_device_train_batch_size": 4, "output_dir": folder})])
        runs[name] = folder, runs[name]
    return runs


def test_two_processes_train_as_one(one_process, tmp_path):
    folder, options = one_process["lora"]
    launch("ddp", tmp_path, options | {"output_dir": tmp_path / "two"})
    assert_same_run(tmp_path / "two", folder)


def test_fsdp2_trains_all_weights_and_resumes(one_process, tmp_path):
    folder, options = one_process["full"]
    options = options | {"output_dir": tmp_path / "two"}
    log = launch("fsdp2", tmp_path, options | {"max_steps": 2}, options)
    assert "Going on from" in log
    assert (tmp_path / "two" / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file(), "was it FSDP?"
    assert_same_run(tmp_path / "two", folder)


def test_fsdp2_trains_an_adapter_as_one_process(one_process, tmp_path):
    folder, options = one_process["lora"]
    launch("fsdp2", tmp_path, options | {"output_dir": tmp_path / "two", "activation_checkpointing": "true"})
    assert_same_run(tmp_path / "two", folder)
