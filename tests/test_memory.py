"""The dry run counts what the real model has, and what autograd really keeps."""

import json
import re

import huggingface_hub
import pytest
import torch
from transformers import get_scheduler

from thinkclearly import cli
from thinkclearly.data.options import DataArguments
from thinkclearly.models.instruction_head import ClearConfig
from thinkclearly.models.janus.meta import empty_janus
from thinkclearly.models.load import Checkpoint, load_checkpoint
from thinkclearly.training import memory, setup
from thinkclearly.training.clear import ClearArguments
from thinkclearly.training.methods import parse_options
from thinkclearly.training.options import LoraArguments, ModelArguments, Options, RunArguments
from thinkclearly.training.setup import build_model


@pytest.fixture(params=["golden", "tiny"])
def base(request, golden):
    return "tiny" if request.param == "tiny" else str(golden / "checkpoint")


def build(base, checkpoint, **lora):
    config = ClearConfig(checkpoint.token_model.codebook_size)
    parts = LoraArguments(lora_dropout=0.0, **lora), DataArguments(), ClearArguments(), RunArguments()
    return build_model(Options(ModelArguments(base), *parts, {}), checkpoint, config)


def empty(base, **lora):
    with torch.device("meta"):
        return build(base, Checkpoint(empty_janus(base), None), **lora)


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
def test_parameters_are_those_of_the_real_model(base, rank):
    model = empty(base, lora_r=rank)
    real = build(base, load_checkpoint(base), lora_r=rank)
    sizes = {name: (p.shape, p.requires_grad) for name, p in real.named_parameters()}
    assert sizes == {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    parts = {part.name: part for part in memory.weights(model, torch.float32)}
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in real.parameters())
    assert sum(part.bytes for part in parts.values()) == sum(p.nbytes for p in real.parameters())
    assert parts["vqmodel"].parameters == sum(p.numel() for p in real.base.model.vqmodel.parameters())
    gradients, states = memory.learning(model, torch.float32)
    assert gradients.bytes == sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert states.bytes == 2 * gradients.bytes
    small = {part.name: part for part in memory.weights(model, torch.bfloat16, in_4bit=True)}
    assert small["vqmodel"].bytes == parts["vqmodel"].bytes and small["lm_head"].bytes == parts["lm_head"].bytes / 2
    assert 0.12 < small["language_model"].bytes / parts["language_model"].bytes < 0.25


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_activations_are_what_autograd_keeps(golden, autocast):
    base = str(golden / "checkpoint")
    checkpoint = load_checkpoint(base)
    model, n = build(base, checkpoint, lora_r=4).train(), checkpoint.processor.num_image_tokens
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
    ):
        loss = model(**memory.example_batch(model.token_model, 2)).nll.sum()
    softmax = 4 * 2 * n * 129
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own) - softmax
    found, logits = memory.activations(empty(base, lora_r=4), 2, autocast, checkpointing=False)
    assert loss.requires_grad and logits.bytes == 3 * softmax
    assert found.bytes == pytest.approx(real, rel=0.25)
    less, _ = memory.activations(empty(base, lora_r=4), 2, autocast, checkpointing=True)
    assert less.bytes < found.bytes / 2


def test_a_config_of_deepseek_alone_is_enough(tmp_path):
    language = {"max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400}
    config = {"model_type": "multi_modality", "language_config": language}
    (tmp_path / "config.json").write_text(json.dumps(config))
    count = sum(p.numel() for p in empty_janus(str(tmp_path)).parameters())
    assert count / 1e9 == pytest.approx(7.42, abs=0.02), "Janus-Pro-7B"


def test_a_dry_run_prints_a_table_and_touches_nothing(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(setup, "load_checkpoint", None)
    argv = ["--base_model", base, "--dry_run", "true", "--load_in_4bit", "true", "--optim", "paged_adamw_8bit"]
    cli.main(["train", *argv, "--output_dir", str(tmp_path / "out"), "--activation_checkpointing", "true"])
    page = capsys.readouterr().out
    for word in ("language_model", "LoRA", "gradients", "optimizer states", "activations", "logits", "total", "FSDP2"):
        assert word in page
    assert "checkpointing on" in page and not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["janus4o", "janus4o_lora"])
def test_janus4os_recipes_train_every_part_but_the_tokenizer_or_lora(recipe, capsys, monkeypatch, pytestconfig):
    monkeypatch.setattr(setup, "load_checkpoint", None)
    path = pytestconfig.rootpath / "recipes" / f"{recipe}.yaml"
    cli.main(["train", str(path), "--base_model", "tiny", "--dry_run", "true"])
    page = capsys.readouterr().out
    sizes = dict(re.findall(r"^(\w[\w ]*?)\s+([\d,]+)\s+[\d.]+$", page, re.MULTILINE))
    sizes = {name: int(size.replace(",", "")) for name, size in sizes.items()}
    learning = {"LoRA"} if "LoRA" in sizes else sizes.keys() - {"vqmodel", "gradients"}
    assert ("LoRA" in sizes) == (recipe == "janus4o_lora") and "total" in page
    assert sizes["gradients"] == sum(sizes[name] for name in learning)


def test_janus4os_learning_rate_rises_over_a_twentieth_and_ends_at_its_floor(pytestconfig):
    path = pytestconfig.rootpath / "recipes" / "janus4o.yaml"
    training = parse_options([str(path), "--bf16", "false"], "thinkclearly train")[0].training
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=training.learning_rate)
    schedule = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(200),
        num_training_steps=200,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    rates = []
    for _ in range(201):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and max(rates) == rates[10] == 5e-6
    assert rates[200] == pytest.approx(0.15 * 5e-6) == min(rates[10:])


def test_a_base_that_is_not_there_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="--base_model a folder"):
        empty_janus("nobody/no-such-model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=str(tmp_path)):
        empty_janus(str(tmp_path))
