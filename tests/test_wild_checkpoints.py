"""Checkpoints as people have published them: each loads as what it is, or is refused by name.

Tiny replicas of their peculiarities, made from the golden checkpoint.
"""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from janus_reference import same
from safetensors.torch import save_file

from thinkclearly.commands import convert
from thinkclearly.models.finetunes import load_any
from thinkclearly.models.janus.checkpoint import load_janus
from thinkclearly.models.janus.processor import PAD, JanusProcessor
from thinkclearly.models.load import load_checkpoint, load_empty
from thinkclearly.models.weight_files import find_weights
from thinkclearly.sequence import FULL, answering, drawing, named_row

ROLES = ("<|User|>", "<|Assistant|>")


@pytest.fixture(scope="module")
def model(golden):
    return load_janus(golden / "checkpoint")


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A copy of the golden checkpoint to change."""
    return Path(shutil.copytree(golden / "checkpoint", tmp_path / "checkpoint"))


def rewrite(path, change):
    """The JSON file after `change`, which alters its content in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def set_format(checkpoint, name):
    rewrite(checkpoint / "processor_config.json", lambda config: config.update(sft_format=name))


def remove_roles(checkpoint):
    """Makes the tokenizer one that has no tokens for user and assistant."""

    def from_tokenizer(content):
        content["added_tokens"] = [item for item in content["added_tokens"] if item["content"] not in ROLES]
        content["model"]["vocab"] = {word: i for word, i in content["model"]["vocab"].items() if word not in ROLES}

    def from_config(content):
        decoder = content["added_tokens_decoder"]
        content["added_tokens_decoder"] = {i: item for i, item in decoder.items() if item["content"] not in ROLES}
        tokens = [word for word in content["additional_special_tokens"] if word not in ROLES]
        content["additional_special_tokens"] = tokens

    rewrite(checkpoint / "tokenizer.json", from_tokenizer)
    rewrite(checkpoint / "tokenizer_config.json", from_config)
    (checkpoint / "special_tokens_map.json").unlink()


def in_words(prompt):
    return prompt.replace(ROLES[0], "User").replace(ROLES[1], "Assistant")


# ---- a bare state dict over a base -------------------------------------------------------------------------------


@pytest.fixture
def small_files(checkpoint):
    """What a base holds beside its weights."""
    (checkpoint / "model.safetensors").unlink()
    return checkpoint


@pytest.mark.parametrize("suffix", ("bin", "pt", "pth", "safetensors"))
def test_a_state_dict_replaces_the_weights_of_its_base(golden, small_files, tmp_path, model, weights, suffix):
    file = tmp_path / f"tuned.{suffix}"
    changed = weights | {"language_model.lm_head.weight": weights["language_model.lm_head.weight"] + 1}
    save_file(changed, file) if suffix == "safetensors" else torch.save(changed, file)
    network = load_checkpoint(str(small_files), weights=file).network
    assert torch.equal(network.lm_head.weight, changed["language_model.lm_head.weight"].float())
    assert torch.equal(network.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert same(load_any(file, base=small_files)[0].network, network)


def test_every_key_of_a_state_dict_is_accounted_for(small_files, tmp_path, weights):
    file = tmp_path / "tuned.pth"
    torch.save({("x." + key if key == "gen_embed.weight" else key): value for key, value in weights.items()}, file)
    with pytest.raises(ValueError, match=r"1 missing: gen_embed.weight(.|\n)*1 unexpected: x.gen_embed.weight"):
        load_checkpoint(str(small_files), weights=file)


def test_a_state_dict_is_only_read_if_it_holds_nothing_but_tensors(small_files, tmp_path, weights):
    file = tmp_path / "tuned.pt"
    torch.save({"model": weights, "step": 5}, file)
    with pytest.raises(ValueError, match="tuned.pt holds dict of other things than tensors"):
        load_checkpoint(str(small_files), weights=file)
    torch.save({"path": Path()}, file)
    with pytest.raises(ValueError, match="tuned.pt is damaged or holds more than tensors"):
        load_checkpoint(str(small_files), weights=file)


def test_a_state_dict_needs_a_base_of_its_layout(golden, tmp_path, weights):
    file = tmp_path / "tuned.pt"
    torch.save(weights, file)
    with pytest.raises(ValueError, match="give the model that they belong to"):
        load_any(file)
    with pytest.raises(ValueError, match="tiny_janus is in transformers' layout"):
        load_any(file, base="tiny")
    with pytest.raises(FileNotFoundError, match="absent.pt is no file"):
        load_checkpoint(str(golden / "checkpoint"), weights=tmp_path / "absent.pt")


@pytest.mark.parametrize("layout", ("native", "deepseek"))
def test_convert_makes_a_whole_checkpoint_of_a_state_dict(small_files, tmp_path, model, weights, layout):
    torch.save(weights, tmp_path / "tuned.bin")
    options = ["--weights", tmp_path / "tuned.bin", "--output_dir", tmp_path / "out", "--to", layout]
    convert.main([str(option) for option in ("--model", small_files, "--dtype", "float32", *options)])
    assert same(load_checkpoint(str(tmp_path / "out")).network, model)


# ---- User and Assistant in words ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", (True, False))
def test_the_roles_are_words_where_the_checkpoint_says_deepseek_old(checkpoint, prompts, sizes, tmp_path, tokens):
    set_format(checkpoint, "deepseek_old")
    if not tokens:
        remove_roles(checkpoint)
    processor = load_checkpoint(str(checkpoint)).processor

    def ids(sample):
        return processor.rows([named_row(sample, FULL)]).input_ids[0].tolist()

    image = "<image_placeholder>"
    drawn = in_words(prompts["t2i_a.prompt"])
    assert drawn == "User: a red circle on the left\n\nAssistant:<begin_of_image>"
    assert ids(drawing("a red circle on the left")) == processor.tokenizer.encode(drawn)
    asked = in_words(prompts["square.understand.prompt"])
    asked = asked.replace(image, f"<begin_of_image>{image * sizes.positions}<end_of_image>")
    assert ids(answering("What colour is the shell?", [0])) == processor.tokenizer.encode(asked)

    processor.save_pretrained(tmp_path / "saved")
    again = JanusProcessor.from_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "processor_config.json").read_text())["sft_format"] == "deepseek_old"
    row = named_row(drawing("a red circle on the left", [0]), FULL)
    assert torch.equal(again.rows([row]).input_ids, processor.rows([row]).input_ids)


def test_a_checkpoint_without_sft_format_has_the_processors_default(checkpoint, prompts):
    rewrite(checkpoint / "processor_config.json", lambda config: config.pop("sft_format"))
    processor = JanusProcessor.from_pretrained(str(checkpoint))
    ids = processor.rows([named_row(drawing("a red circle on the left"), FULL)]).input_ids[0].tolist()
    assert ids == processor.tokenizer.encode(prompts["t2i_a.prompt"])


@pytest.mark.parametrize("name", ("llama-2", "plain", None, ["deepseek"]))
def test_an_unknown_sft_format_is_refused_by_name(checkpoint, name):
    set_format(checkpoint, name)
    with pytest.raises(ValueError) as error:
        load_checkpoint(str(checkpoint))
    assert f"sft_format {name!r}; expected 'deepseek' or 'deepseek_old'" in str(error.value)


def test_a_tokenizer_without_role_tokens_is_refused_where_the_prompts_need_them(checkpoint):
    remove_roles(checkpoint)
    with pytest.raises(
        ValueError, match=r"lacks \['<\|User\|>', '<\|Assistant\|>'\].*set sft_format to 'deepseek_old'"
    ):
        load_checkpoint(str(checkpoint))


def test_export_keeps_the_template(checkpoint, tmp_path):
    set_format(checkpoint, "deepseek_old")
    for layout in ("native", "deepseek"):
        out = tmp_path / layout
        convert.main(["--model", str(checkpoint), "--output_dir", str(out), "--to", layout])
        assert JanusProcessor.from_pretrained(str(out)).sft_format == "deepseek_old"
    convert.main(["--model", str(tmp_path / "native"), "--output_dir", str(tmp_path / "back"), "--to", "deepseek"])
    assert JanusProcessor.from_pretrained(str(tmp_path / "back")).sft_format == "deepseek_old"


# ---- indices, adapters -------------------------------------------------------------------------------------------


def write_index(folder, name, files):
    (folder / name).write_text(json.dumps({"weight_map": {f"key{i}": file for i, file in enumerate(files)}}))


def test_an_index_of_absent_files_beside_whole_weights_is_passed_over(checkpoint, model, weights):
    old = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    write_index(checkpoint, "pytorch_model.bin.index.json", old)
    write_index(checkpoint, "model.safetensors.index.json", ["model-00001-of-00007.safetensors"])
    assert same(load_janus(checkpoint), model)

    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    assert find_weights(checkpoint) == [checkpoint / "pytorch_model.bin"]

    (checkpoint / "pytorch_model.bin").unlink()
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, name in enumerate(names):
        save_file({key: weights[key] for key in list(weights)[i::2]}, checkpoint / name)
    assert find_weights(checkpoint) == [checkpoint / name for name in names]
    assert same(load_janus(checkpoint), model)

    (checkpoint / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match="names model-00001-of-00007.safetensors, absent"):
        load_janus(checkpoint)


def test_a_native_checkpoint_in_a_pickle_beside_a_stale_index_loads(checkpoint, model, tmp_path):
    native = tmp_path / "native"
    model.save_pretrained(native)
    torch.save(model.state_dict(), native / "pytorch_model.bin")
    (native / "model.safetensors").unlink()
    write_index(native, "model.safetensors.index.json", ["model-00001-of-00002.safetensors"])
    assert same(load_janus(native), model)


@pytest.mark.parametrize("content", ({}, {"peft_type": "LORA"}, {"base_model_name_or_path": "somebody/else"}))
def test_an_almost_empty_adapter_config_beside_whole_weights_changes_nothing(checkpoint, model, caplog, content):
    (checkpoint / "adapter_config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.INFO, "thinkclearly"):
        network = load_any(checkpoint)[0].network
    assert same(network, model)
    assert "has an adapter_config.json, but no adapter" in caplog.text


def test_an_adapter_config_alone_beside_native_weights_is_refused(model, golden, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json, but no adapter beside it.*Remove"):
        load_janus(tmp_path)


def test_whole_weights_and_an_adapter_in_one_folder_are_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, checkpoint / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"whole weights and an adapter \(adapter_model.safetensors\)"):
        load_any(checkpoint)


def test_an_almost_empty_adapter_config_of_a_finetune_is_refused_by_name(golden, tmp_path):
    finetune = shutil.copytree(golden / "finetune", tmp_path / "finetune")
    (finetune / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter_config.json has peft_type None"):
        load_any(finetune, base=golden / "checkpoint")


# ---- other families, tokenizers, dtypes --------------------------------------------------------------------------


def test_deepseek_vl_is_refused_as_what_it_is(checkpoint):
    def as_deepseek_vl(config):
        for name in [name for name in config if name.startswith("gen_")]:
            del config[name]

    rewrite(checkpoint / "config.json", as_deepseek_vl)
    remove_roles(checkpoint)  # nor has its tokenizer what Janus needs; that is not the point
    for load in (load_checkpoint, load_janus, load_any, load_empty):
        with pytest.raises(ValueError, match="is a deepseek-vl checkpoint.*cannot make any"):
            load(str(checkpoint))


def test_the_first_janus_without_a_pad_token_loads(checkpoint, model, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        rewrite(checkpoint / name, lambda content: content.pop("pad_token"))
    loaded = load_checkpoint(str(checkpoint))
    assert same(loaded.network, model)
    assert loaded.processor.pad_id == loaded.processor.tokenizer.pad_token_id == 2
    assert loaded.network.generation_config.pad_token_id == 2
    loaded.processor.save_pretrained(tmp_path / "saved")
    assert JanusProcessor.from_pretrained(str(tmp_path / "saved")).tokenizer.pad_token == PAD


def test_ids_are_looked_up_by_string(checkpoint):
    """Pad has other numbers in Janus-Pro-1B (100002) and 7B (100015); here it changes places with <unk>."""
    swap = {PAD: "<unk>", "<unk>": PAD}

    def in_tokenizer(content):
        for item in content["added_tokens"]:
            item["content"] = swap.get(item["content"], item["content"])
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {swap.get(word, word): i for word, i in vocabulary.items()}

    def in_config(content):
        for item in content["added_tokens_decoder"].values():
            item["content"] = swap.get(item["content"], item["content"])

    rewrite(checkpoint / "tokenizer.json", in_tokenizer)
    rewrite(checkpoint / "tokenizer_config.json", in_config)
    loaded = load_checkpoint(str(checkpoint))
    assert loaded.processor.pad_id == loaded.network.generation_config.pad_token_id == 375
    ids = loaded.processor.rows([named_row(drawing("make it blue", [0]), FULL)]).input_ids
    assert (ids == 375).sum() == loaded.processor.num_image_tokens and not (ids == 2).any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_half_precision_weights_load_in_any_dtype(checkpoint, weights, dtype):
    half = {key: tensor.half() for key, tensor in weights.items()}
    save_file(half, checkpoint / "model.safetensors")
    rewrite(checkpoint / "config.json", lambda config: config.update(torch_dtype="float16"))
    network = load_janus(checkpoint, dtype=dtype)
    assert torch.equal(network.lm_head.weight, half["language_model.lm_head.weight"].to(dtype))
    assert {p.dtype for p in network.model.vqmodel.parameters()} == {torch.float32}
    assert {p.dtype for p in network.model.language_model.parameters()} == {dtype}
    rows = network.model.vqmodel.quantize.embedding.weight.norm(dim=-1)
    assert torch.allclose(rows, torch.ones_like(rows))
