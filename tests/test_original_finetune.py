"""The original's directory format: read whole, or refused with what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from janus_reference import adapted
from safetensors.torch import load_file, save_file

from thinkclearly.models.janus.checkpoint import load_janus
from thinkclearly.models.janus.original_finetune import (
    check_original_base,
    is_original_finetune,
    read_original_finetune,
)

pytestmark = pytest.mark.golden


@pytest.fixture
def finetune(golden, tmp_path):
    return Path(shutil.copytree(golden / "finetune", tmp_path / "finetune"))


def test_finetune_adapts_language_model_and_head_only(golden):
    model, _, _ = adapted(golden, golden / "finetune")
    names = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(".base_layer")
    }
    assert names == {name.removesuffix(".base_layer") for name in linears}
    layers = model.config.text_config.num_hidden_layers
    assert len([name for name in names if ".language_model.layers." in name]) == 7 * layers
    assert len([name for name in names if ".generation_head." in name]) == 2
    assert len(names) == 7 * layers + 2


def test_finetune_from_bin(golden, finetune):
    state = load_file(finetune / "adapter_model.safetensors")
    torch.save(state, finetune / "adapter_model.bin")
    (finetune / "adapter_model.safetensors").unlink()
    ours, reference = read_original_finetune(finetune), read_original_finetune(golden / "finetune")
    assert ours[0].to_dict() == reference[0].to_dict()
    assert ours[1].keys() == reference[1].keys() and all(
        torch.equal(ours[1][key], reference[1][key]) for key in ours[1]
    )


def test_finetune_uses_the_copy_that_inference_loads_last(finetune, caplog):
    path = finetune / "gen_head_clear.pt"
    head = torch.load(path, weights_only=True)
    key = "base_head.vision_head.lora_B.default.weight"
    head[key] = head[key] + 1
    torch.save(head, path)
    _, lora, _, _ = read_original_finetune(finetune)
    assert torch.equal(lora["base_model.model.model.generation_head.vision_head.lora_B.weight"], head[key])
    assert "vision_head differ" in caplog.text
    torch.save({k: v for k, v in head.items() if k.startswith("clear_linear")}, path)
    _, lora, _, _ = read_original_finetune(finetune)
    adapter = load_file(finetune / "adapter_model.safetensors")
    saved = adapter["base_model.model.gen_head_clear.base_head.vision_head.lora_B.weight"]
    assert torch.equal(lora["base_model.model.model.generation_head.vision_head.lora_B.weight"], saved)


def test_is_original_finetune(golden, finetune, tmp_path):
    assert is_original_finetune(finetune)
    (finetune / "gen_head_clear.pt").unlink()
    (finetune / "clear_meta.json").unlink()
    assert is_original_finetune(finetune)  # by its DeepSeek module names, so that the missing head is reported
    assert not is_original_finetune(golden / "checkpoint") and not is_original_finetune(tmp_path / "nowhere")
    (finetune / "adapter_config.json").write_text(json.dumps({"target_modules": r"model\.language_model\..*"}))
    assert not is_original_finetune(finetune)


def head_with(change):
    def apply(directory):
        head = torch.load(directory / "gen_head_clear.pt", weights_only=True)
        change(head)
        torch.save(head, directory / "gen_head_clear.pt")

    return apply


def lora_with(change):
    def apply(directory):
        state = load_file(directory / "adapter_model.safetensors")
        change(state)
        save_file(state, directory / "adapter_model.safetensors")

    return apply


_Q = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: (d / "gen_head_clear.pt").unlink(), FileNotFoundError, "no gen_head_clear.pt"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), FileNotFoundError, "the adapter is missing"),
        (lambda d: (d / "adapter_config.json").unlink(), FileNotFoundError, "no adapter_config.json"),
        (head_with(lambda h: h.pop("clear_linear.bias")), ValueError, "not clear_linear.bias"),
        (head_with(lambda h: h.update(other=torch.zeros(1))), ValueError, "has other"),
        (
            head_with(lambda h: h.update({"clear_linear.weight": torch.zeros(1, 3)})),
            ValueError,
            "different fine-tunes",
        ),
        (head_with(lambda h: h.update({"clear_linear.bias": torch.zeros(2)})), ValueError, r"bias \(2,\)"),
        (lora_with(lambda s: s.pop(_Q)), ValueError, "layers.0.self_attn.q_proj has"),
        (lora_with(lambda s: s.update({_Q: s[_Q][1:].clone()})), ValueError, r"says r=\d+"),
        (
            lora_with(lambda s: s.update({_Q.replace("lora_A.weight", "bias"): torch.zeros(1)})),
            ValueError,
            "LoRA tensors",
        ),
        (
            lora_with(lambda s: s.update({"base_model.model.aligner.layers.0.lora_A.weight": s[_Q].clone()})),
            ValueError,
            "adapts 'aligner.layers.0'",
        ),
        (lambda d: edit_adapter(d, use_dora=True), ValueError, "use_dora"),
        (lambda d: edit_adapter(d, peft_type="IA3"), ValueError, "'IA3'"),
    ],
)
def test_broken_finetunes(finetune, change, error, message):
    change(finetune)
    with pytest.raises(error, match=message):
        read_original_finetune(finetune)


def edit_adapter(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_finetune_on_another_base(golden):
    other = load_janus(golden / "checkpoint")
    other.model.generation_head.vision_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="Load the base that the fine-tune was made from"):
        check_original_base(golden / "finetune", other)
