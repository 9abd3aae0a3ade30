"""The fingerprint of a model: the same when it is loaded again, another one when anything of it changes."""

import pytest
import torch

from thinkclearly.editing.editor import Editor
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.models.fingerprint import fingerprint
from thinkclearly.models.instruction_head import head_digest

pytestmark = pytest.mark.golden


def load(golden, **options):
    return load_clear_model(golden / "finetune", base=golden / "checkpoint", **options)


@pytest.fixture
def model(golden):
    return load(golden)[0]


def test_the_same_files_give_the_same_fingerprint(golden, model):
    assert fingerprint(load(golden)[0]) == fingerprint(model)
    editor = Editor(*load(golden))
    assert editor.fingerprint(top_k=3) == fingerprint(model) | {"settings": vars(editor.settings) | {"top_k": 3}}


@pytest.mark.parametrize("part", ["lora_B", "clear_head.bias", "vqmodel", "vision_model", "language_model.norm"])
def test_any_changed_weight_changes_it(model, part):
    before = fingerprint(model)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if part in name).add_(0.01)
    changed = fingerprint(model)
    assert changed.pop("weights") != before.pop("weights") and changed == before


def test_the_strength_of_an_adapter_changes_it(model):
    before = fingerprint(model)["weights"]
    next(module for module in model.modules() if hasattr(module, "lora_A")).set_scale("default", 2.0)
    assert fingerprint(model)["weights"] != before


def test_the_precision_changes_it(golden, model):
    half = fingerprint(load(golden, dtype=torch.bfloat16)[0])
    assert half["dtype"] == "bfloat16" and half["weights"] != fingerprint(model)["weights"]


@pytest.mark.parametrize(
    "changes", [{"edit": {"temperature": 0.5}}, {"clear_weight": 0.5}, {"gate_bias": 1.0}, {"gate_temperature": 2.0}]
)
def test_the_gate_and_its_defaults_change_it_and_the_head_s_digest(model, changes):
    before, head = fingerprint(model), head_digest(model.clear_head.weight, model.clear_config)
    vars(model.clear_config).update(changes)
    changed = fingerprint(model)
    assert changed["clear_config"] != before["clear_config"] and changed["weights"] == before["weights"]
    assert head_digest(model.clear_head.weight, model.clear_config) != head
