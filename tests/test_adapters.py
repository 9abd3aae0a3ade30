"""What is saved comes back, and nothing at random."""

import json
import pickle
import shutil

import pytest
import torch
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny_runs import CODES, Touch, batch_of, fresh, make_trainer, records

from thinkclearly.models.finetunes import load_base, load_clear_model
from thinkclearly.models.instruction_head import ClearConfig, read_base_name
from thinkclearly.models.load import load_checkpoint
from thinkclearly.sequence import FULL, drawing, named_row
from thinkclearly.training.adapters import train_fully


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_what_is_saved_comes_back(golden, tmp_path, options):
    pair = fresh(golden, **options)
    rows = records(golden, 2)
    trainer = make_trainer(pair, rows, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert {"adapter_config.json", "adapter_model.safetensors", "gen_head_clear.safetensors", "clear_config.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    again = load_clear_model(tmp_path)
    assert again[0].clear_config == pair[0].clear_config
    batch = batch_of(pair, rows)
    # Frozen, as the loaded one is: torch picks other kernels for weights that could need gradients.
    assert torch.equal(again[0](**batch).nll, pair[0].eval().requires_grad_(False)(**batch).nll)
    assert not any(p.requires_grad for p in again[0].parameters())
    row = named_row(drawing("Make it blue.", [0]), FULL)
    assert torch.equal(again[1].rows([row]).input_ids, pair[1].rows([row]).input_ids)


def test_full_fine_tuning_comes_back(golden, tmp_path):
    checkpoint = load_checkpoint(golden / "checkpoint")
    model = train_fully(checkpoint, ClearConfig(CODES))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer((model, checkpoint.processor), records(golden, 2), tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    learnt = ("network.model.language_model.", "network.model.generation_head.", "clear_head.")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if name.startswith(learnt)}
    batch = batch_of((model, checkpoint.processor), records(golden, 2))
    before = model.eval().requires_grad_(False)(**batch).nll
    assert torch.equal(load_clear_model(tmp_path)[0](**batch).nll, before)
    model.base.model.generation_head.vision_head.weight.add_(1)
    trainer._load_from_checkpoint(str(tmp_path))
    assert torch.equal(model(**batch).nll, before)


@pytest.fixture
def saved(golden, tmp_path):
    pair = fresh(golden)
    directory = tmp_path / "saved"
    pair[0].save_pretrained(directory)
    return directory


def test_pickles_beside_the_weights_are_never_read(saved, tmp_path):
    marker = tmp_path / "executed"
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (saved / name).write_bytes(pickle.dumps(Touch(marker)))
    load_clear_model(saved)
    assert not marker.exists()


def test_a_missing_head_is_an_error(saved):
    (saved / "gen_head_clear.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="gen_head_clear.safetensors"):
        load_clear_model(saved)
    (saved / "clear_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no CLEAR head"):
        load_clear_model(saved)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, r"\(1, 32\).*\(1, 64\)"),
        ({"weight": torch.zeros(1, 64), "bias": torch.zeros(2)}, "another base"),
        ({"weight": torch.zeros(1, 64)}, "expected 'weight' and 'bias'"),
    ],
)
def test_a_head_of_another_shape_is_an_error(saved, tensors, message):
    save_file(tensors, saved / "gen_head_clear.safetensors")
    with pytest.raises(ValueError, match=message):
        load_clear_model(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("codebook_hash", "0123456789abcdef", "codebook 0123456789abcdef"),
        ("codebook_size", 64, "64 codes"),
        ("instructions", ["CLEAR", "WARP"], "WARP"),
        ("invented_later", 1, "invented_later"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error(saved, key, value, message):
    path = saved / "clear_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_clear_model(saved)


def test_an_adapter_of_another_base_is_an_error(golden, saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    layer = [name for name in tensors if ".layers.2." in name]
    assert layer

    save_file({name: t for name, t in tensors.items() if name not in layer}, path)
    with pytest.raises(ValueError, match="does not fit this base model.*layers.2"):
        load_clear_model(saved)  # PEFT itself would leave the layer at random

    save_file(tensors | {layer[0].replace(".layers.2.", ".layers.9."): tensors[layer[0]].clone()}, path)
    with pytest.raises(ValueError, match="layers.9"):
        load_clear_model(saved)

    wider = {name: torch.cat([t, t], -1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, path)
    with pytest.raises(ValueError, match="size mismatch.*base="):
        load_clear_model(saved)
    trainer = make_trainer(fresh(golden), records(golden, 1), saved)
    with pytest.raises(ValueError, match="size mismatch"):
        trainer._load_from_checkpoint(str(saved))


def test_the_path_of_a_local_base_is_found_but_in_no_file_that_the_hub_would_get(golden, saved):
    assert read_base_name(saved) == str(golden / "checkpoint")
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    files = [path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()]
    shared = list(filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS))
    assert "adapter_config.json" in shared and "README.md" not in shared
    assert not [name for name in shared if str(golden).encode() in (saved / name).read_bytes()]


def test_a_readme_beside_the_weights_is_left_alone(golden, saved):
    (saved / "README.md").write_text("Mine.\n")
    load_clear_model(saved)[0].save_pretrained(saved)
    assert (saved / "README.md").read_text() == "Mine.\n"
    assert read_base_name(saved) == str(golden / "checkpoint")


def test_an_adapter_must_name_a_base_that_exists(saved):
    shutil.rmtree(saved / ".cache")
    with pytest.raises(ValueError, match="names no base model; pass it as base="):
        load_clear_model(saved)


def test_an_original_finetune_on_another_base_is_an_error(golden, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(golden / "checkpoint", other)
    weights = load_file(other / "model.safetensors")
    name = next(key for key in weights if key.startswith("gen_head.") and key.endswith("weight"))
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Load the base that the fine-tune was made from"):
        load_clear_model(golden / "finetune", base=other)


def test_a_name_that_is_no_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        load_clear_model(str(tmp_path / "nothing" / "here"))


def test_a_base_without_head_has_no_instructions(golden):
    model, _ = load_base(golden / "checkpoint")
    assert len(model.vocabulary) == 0
    assert model.logits(torch.zeros(1, 64)).shape == (1, CODES)
