"""A Chameleon is fine-tuned, saved, shared and used like any other family."""

import json
import re

import numpy as np
import pytest
import torch
from test_sft import flags, write_records

from thinkclearly import cli, load_editor, load_model
from thinkclearly.data.collator import Collator
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.files import BUILT_IN, is_local
from thinkclearly.hub.publish import built_in_id, check_publishable, staged
from thinkclearly.images import Letterbox
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.chameleon.model import Chameleon
from thinkclearly.models.finetunes import load_any, load_clear_model
from thinkclearly.models.folder import BY_NAME
from thinkclearly.models.load import load_checkpoint
from thinkclearly.sequence import Dropout
from thinkclearly.training import memory, setup


@pytest.fixture(scope="module")
def common(chameleon, tmp_path_factory):
    options = {"base_model": chameleon, "prepared_dir": tmp_path_factory.mktemp("prepared"), "max_steps": 2}
    options |= {
        "lora_r": 4,
        "lora_dropout": 0.0,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "no",
        "use_cpu": "true",
    }
    return options | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_strategy": "no"}


@pytest.fixture(scope="module")
def records(common, tmp_path_factory):
    path = write_records(tmp_path_factory.mktemp("records"), 4)
    return common | {"method": "sft", "source": "sharegpt4o", "path": path, "eval_samples": 4}


@pytest.fixture(scope="module")
def edits(common):
    options = {"limit": 16, "shapes_size": 64, "eval_samples": 4, "calibration_edits": 0, "sample_edits": 0}
    return common | options | {"drop_source": 0.5, "clear_head_lr": 1e-2}


def train(options, folder):
    cli.main(["train", *flags(options | {"output_dir": folder})])
    return folder


@pytest.fixture(scope="module")
def supervised(records, tmp_path_factory):
    return train(records, tmp_path_factory.mktemp("run") / "sft")


@pytest.fixture(scope="module")
def clear(edits, tmp_path_factory):
    return train(edits, tmp_path_factory.mktemp("run") / "clear")


@pytest.fixture(scope="module")
def picture():
    return random_edit(11, 3, packaged_photos("test")).render(96, 64)[0]


def learnt(model):
    return {name for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 0}


def test_lora_learns_in_the_layers_and_the_head(supervised):
    model, _ = load_any(supervised)
    assert isinstance(model.token_model, Chameleon) and len(model.vocabulary) == 0
    modules = {name.removeprefix("network.base_model.model.").partition(".lora_B")[0] for name in learnt(model)}
    layer = [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
    assert modules == {f"model.layers.{i}.{name}" for i in range(2) for name in layer} | {"lm_head"}


def test_what_was_trained_on_pictures_edits_and_questions_draws_edits_and_answers(supervised, chameleon, picture):
    tuned, base = load_model(supervised), load_model(chameleon)
    results = []
    for model in (tuned, base):
        (drawn,) = model.generate("A red star.", seed=3)
        edited = model.edit(picture, "Make it blue.", seed=3)
        assert drawn.size == (64, 64) and edited.image.size == picture.size and edited.clear_fraction == 0
        results.append(edited.class_ids)
    assert not torch.equal(*results), "the adapter is there"
    (answer,) = tuned.describe(picture, "What is it?", max_new_tokens=8)
    assert isinstance(answer, str)


def test_an_answer_never_has_tokens_of_pictures(chameleon, picture):
    """Untrained, its likeliest words would be anything."""
    model = load_model(chameleon)
    said = []
    tokenizer = model.processor.tokenizer
    decode, tokenizer.batch_decode = tokenizer.batch_decode, lambda ids, **_: said.append(ids) or [""]
    try:
        model.describe(picture, "What?", max_new_tokens=40)
        model.describe(picture, "What?", max_new_tokens=40, temperature=5.0)
    finally:
        tokenizer.batch_decode = decode
    ids = {int(i) for each in said for i in each.flatten()}
    assert len(ids) > 10 and not ids & set(model.processor.unsaid_ids)


def test_clear_trains_copies_exactly_and_is_read_back(clear, chameleon, picture):
    editor = load_editor(clear, base=chameleon)
    assert editor.model.vocabulary.names == ("CLEAR",) and learnt(editor.model)
    result = editor.edit(picture, "Make it blue.", seed=1, clear_bias=1e4)
    clear_pixels = Letterbox(*picture.size, 64).unfit_grid(result.clear)
    assert result.clear_fraction == 1 and clear_pixels.all()
    np.testing.assert_array_equal(np.array(result.image), np.array(picture))
    none = editor.edit(picture, "Make it blue.", seed=1, clear_bias=-1e4)
    assert none.clear_fraction == 0 and not torch.equal(none.fed_codes, result.fed_codes)


def test_where_the_source_is_not_shown_plain_codes_are_the_labels(chameleon):
    processor = load_checkpoint(str(chameleon)).processor
    k, n = len(processor.code_ids), processor.num_image_tokens
    row = {"key": "a", "instruction": "Blue.", "input_tokens": [3] * n, "output_tokens": [k] * n}
    for drop, labels in (((0.0, 0.0), k), ((0.0, 1.0), 3), ((1.0, 0.0), 3)):
        batch = Collator(processor, InstructionVocabulary(k), Dropout(*drop))([row])
        assert (batch["labels"] == labels).all() and "pixel_values" not in batch
        assert (batch["known_slots"] >= 0).any() == (drop == (0.0, 0.0))


@pytest.mark.parametrize("task", ["draw", "edit"])
def test_rewards_are_learnt_from_and_samples_are_scored_as_drawn(clear, chameleon, tmp_path, task):
    options = {"method": "grpo", "base_model": chameleon, "use_cpu": "true", "shapes_size": 64, "cfg_weight": 2.0}
    options |= {"task": "edit", "adapter": clear, "limit": 4} if task == "edit" else {"source": "shapes", "lora_r": 4}
    options |= {"per_device_train_batch_size": 1, "num_generations": 2, "max_steps": 1, "logging_steps": 1}
    options |= {"temperature": 1.0, "eval_samples": 2, "eval_strategy": "no", "save_strategy": "no"}
    if task == "draw":
        options |= {"truth_steps": [0], "truth_shares": [0]}
    folder = train(options, tmp_path / "grpo")
    (step,) = (log for log in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in log)
    assert 0 <= step["logp_difference"] < 1e-4 and np.isfinite(step["grad_norm"])


def test_full_fine_tuning_learns_everything_but_the_image_tokenizer(records, chameleon, tmp_path):
    folder = train(records | {"lora_r": 0, "max_steps": 1, "per_device_train_batch_size": 16}, tmp_path / "full")
    before, after = (load_checkpoint(str(path)).network.state_dict() for path in (chameleon, folder))
    assert before.keys() == after.keys()
    kept = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert kept == {name for name in before if ".vqmodel." in name}


@pytest.mark.parametrize("bits", [0, 4])
def test_the_dry_run_counts_what_the_real_model_has(edits, chameleon, capsys, monkeypatch, tmp_path, bits):
    options = edits | {"dry_run": "true", "load_in_4bit": bool(bits), "output_dir": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(setup, "load_checkpoint", None)
        cli.main(["train", *flags(options)])
    page = capsys.readouterr().out
    found = dict(re.findall(r"^(\w[\w ]*?)\s+([\d,]+)\s+[\d.]+$", page, re.MULTILINE))
    checkpoint = load_checkpoint(str(chameleon))
    for name, part in checkpoint.token_model.parts().items():
        count = sum(p.numel() for p in part.parameters())
        assert name not in found or int(found[name].replace(",", "")) == count
    assert {"embed_tokens", "layers", "norm", "vqmodel", "lm_head", "LoRA", "CLEAR head"} <= found.keys()
    assert memory.shown_length(checkpoint.token_model) == checkpoint.processor.num_image_tokens


def test_features_of_a_tower_that_is_not_there_cannot_be_kept(edits, tmp_path, caplog):
    with pytest.raises(SystemExit):
        train(edits | {"cache_features": "true"}, tmp_path)
    assert "sees pictures by their codes" in caplog.text


def test_layers_in_4_bits_train(edits, chameleon, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = train(edits | {"load_in_4bit": "true"}, tmp_path / "small")
    model, _ = load_clear_model(folder)
    assert learnt(model)
    assert not any("4bit" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("merged", [None, "native"])
def test_a_fine_tune_is_shared_as_an_adapter_or_as_whole_weights(clear, chameleon, picture, merged):
    expected = load_editor(clear, base=chameleon).edit(picture, "Make it blue.", seed=3)
    options = {"base_model_id": "you/base", "license": "mit", "merged": merged, "dtype": torch.float32}
    with staged(clear, "you/edit", **options) as folder:
        assert json.loads((folder / "config.json").read_text())["model_type"] == "chameleon"
        assert (folder / "adapter_config.json").exists() == (merged is None)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "- chameleon" in card and "- janus" not in card and "Janus" not in card
        found = load_editor(folder, **({} if merged else {"base": chameleon})).edit(picture, "Make it blue.", seed=3)
    assert torch.equal(found.class_ids, expected.class_ids)


def test_the_models_that_ship_along_have_names_on_the_hub_and_are_no_paths():
    assert [built_in_id("you/edit", name) for name in BUILT_IN] == [
        "you/thinkclearly-tiny-janus",
        "you/thinkclearly-tiny-chameleon",
    ]
    assert set(BUILT_IN) == set(BY_NAME) and not any(map(is_local, BUILT_IN))


def test_words_of_a_vocabulary_are_no_paths_of_this_machine(tmp_path):
    config = {"vocabulary_map": {"/home/": 7}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_publishable(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/model"}))
    with pytest.raises(ValueError, match="config.json holds /home/me/model"):
        check_publishable(tmp_path)


@pytest.mark.parametrize("options", [{"merged": "deepseek"}, {"pt": True}])
def test_layouts_of_janus_are_refused(clear, options):
    with (
        pytest.raises(ValueError, match="of a chameleon.*layouts of Janus"),
        staged(clear, "you/e", base_model_id="y/b", **options),
    ):
        pass


def test_convert_is_for_janus(chameleon, tmp_path, caplog):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--model", str(chameleon), "--output_dir", str(tmp_path / "out")])
    assert "is a Chameleon" in caplog.text and not (tmp_path / "out").exists()
