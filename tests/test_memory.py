"""The dry run counts what the real model has, and what autograd really keeps."""

import json
import re

import huggingface_hub
import pytest
import torch
from conftest import GOLDEN_ROOT
from transformers import get_scheduler

from thinkclearly import cli
from thinkclearly.data.options import DataArguments
from thinkclearly.decoding import reader
from thinkclearly.decoding.cache import BlockCache
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.generation.draw import draw
from thinkclearly.models.finetunes import TINY_CLEAR, load_base, load_clear_model
from thinkclearly.models.instruction_head import ClearConfig
from thinkclearly.models.load import Checkpoint, load_checkpoint, load_empty
from thinkclearly.models.stream import StreamModel
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
        return build(base, Checkpoint(load_empty(base), None), **lora)


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


def grpo_page(capsys, *argv):
    cli.main(["train", "--method", "grpo", "--dry_run", "true", "--lora_r", "4", *argv])
    page = capsys.readouterr().out
    found = re.findall(r"^(\w[\w ,]*?)\s+(?:([\d,]+)\s+)?([\d.]+)$", page, re.MULTILINE)
    return page, {name: (int((count or "0").replace(",", "")), float(gib)) for name, count, gib in found}


def test_grpo_is_counted_with_its_reference_and_the_rows_of_one_pass(capsys):
    """The tiny model: 64 codes a picture of 1024, 6 layers of width 256. 4 pairs of 7 samples with 2 rows each."""
    argv = ["--base_model", "tiny", "--per_device_train_batch_size", "4", "--cfg_weight", "2"]
    page, every = grpo_page(capsys, *argv)
    assert every["reference"] == every["gradients"] and "112 row(s) at a time" in page
    some, parts = grpo_page(capsys, *argv, "--rows_per_forward", "7", "--beta", "0")
    assert "14 row(s) at a time" in some and "reference" not in parts
    assert parts["activations"][1] == pytest.approx(every["activations"][1] / 8, rel=0.05)
    _, one_row = grpo_page(capsys, *argv, "--rows_per_forward", "7", "--logprob_scale", "cond")
    assert one_row["activations"][1] == pytest.approx(parts["activations"][1] / 2, rel=0.05, abs=2e-3)
    slots = 64 + 64 + memory.WORDS
    cache, noise = 2 * 6 * 112 * slots * 256 * 4 / 2**30, 56 * 128 * 1024 * 4 / 2**30
    assert "56 samples of 2 row(s) are drawn before" in page
    assert f"{cache + noise:.3f} GiB for keys and values ({cache:.3f}) and noise ({noise:.3f})" in page


def test_grpo_of_edits_shows_the_source_and_counts_an_adapter_that_goes_on(capsys):
    argv = ["--task", "edit", "--adapter", str(TINY_CLEAR), "--num_generations", "3", "--cfg_weight2", "2"]
    page, parts = grpo_page(capsys, "--base_model", "tiny", *argv)
    slots = 3 * 64 + 64 + memory.WORDS
    cache = 2 * 6 * 3 * 3 * slots * 256 * 4 / 2**30
    assert "9 row(s) at a time" in page and f"keys and values ({cache:.3f})" in page
    model, _ = load_clear_model(TINY_CLEAR)
    assert parts["LoRA"][0] == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_keys_and_values_are_those_that_drawing_keeps(golden, monkeypatch):
    made = []
    monkeypatch.setattr(reader, "BlockCache", lambda *args: made.append(BlockCache(*args)) or made[-1])
    model, processor = load_base(str(golden / "checkpoint"))
    draw(model, processor, ["A star.", "A dog."], DecodeSettings(cfg_weight=2.0), samples=[(0, k) for k in range(2)])
    (cache,) = made
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    samples = memory.Samples(count=2, rows=2, forward_rows=4, edits=False, block=0)
    found, _ = memory.drawing(model.token_model, samples, 128, torch.float32)
    (left, _, slots, _), n = cache.layers[0].keys.shape, processor.num_image_tokens  # who finishes first is let go
    assert found.bytes / 4 / (memory.WORDS + 2 * n) == real / left / slots and slots < memory.WORDS + 2 * n


def test_a_config_of_deepseek_alone_is_enough(tmp_path):
    language = {"max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400}
    config = {"model_type": "multi_modality", "language_config": language}
    (tmp_path / "config.json").write_text(json.dumps(config))
    count = sum(p.numel() for p in load_empty(str(tmp_path)).parameters())
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


@pytest.mark.golden
@pytest.mark.skipif(not (GOLDEN_ROOT / "chameleon_tiny").is_dir(), reason="no golden Chameleon")
@pytest.mark.parametrize("recipe", ["twgi_critique", "twgi_lora_48gb"])
def test_streams_are_counted_by_their_length(recipe, capsys, pytestconfig):
    base = GOLDEN_ROOT / "chameleon_tiny" / "checkpoint"
    argv = ["train", str(pytestconfig.rootpath / "recipes" / f"{recipe}.yaml"), "--base_model", str(base)]
    argv += ["--dry_run", "true", "--bf16", "false", "--activation_checkpointing", "false"]
    found = {}
    for length in (200, 400):
        cli.main([*argv, "--max_stream", str(length)])
        page = capsys.readouterr().out
        assert f"A record is a stream of {length - 1} tokens." in page and "\nprojection " in page
        sizes = re.findall(r"^(\w[\w, ]*?)\s+(?:([\d,]+)\s+)?([\d.]+)$", page, re.MULTILINE)
        found[length] = {name: (int((count or "0").replace(",", "")), float(gib)) for name, count, gib in sizes}
    parts = found[200]
    learning = {"LoRA", "CLEAR head"} if "LoRA" in parts else parts.keys() - {"vqmodel", "gradients", "projection"}
    assert ("LoRA" in parts) == (recipe == "twgi_lora_48gb")
    assert parts["gradients"][0] == sum(parts[name][0] for name in {*learning, "projection"})
    assert found[400]["activations"][1] > 1.5 * parts["activations"][1]


@pytest.mark.golden
@pytest.mark.skipif(not (GOLDEN_ROOT / "chameleon_tiny").is_dir(), reason="no golden Chameleon")
def test_the_parameters_of_streams_are_those_of_the_real_model():
    base = str(GOLDEN_ROOT / "chameleon_tiny" / "checkpoint")
    with torch.device("meta"):
        model = StreamModel.of(build(base, Checkpoint(load_empty(base), None), lora_r=4))
    real = StreamModel.of(build(base, load_checkpoint(base), lora_r=4))
    parts = memory.weights(model, torch.float32)
    assert sum(part.bytes for part in parts) == sum(p.nbytes for p in real.parameters())
    gradients, _ = memory.learning(model, torch.bfloat16)
    assert gradients.bytes == sum(p.nbytes for p in real.parameters() if p.requires_grad), "what is added is float32"
    small = {part.name: part.bytes for part in memory.weights(model, torch.bfloat16, in_4bit=True)}
    assert small["layers"] < 0.2 * next(part.bytes for part in parts if part.name == "layers")


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
        load_empty("nobody/no-such-model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_empty(str(tmp_path))
