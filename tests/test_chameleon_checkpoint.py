"""Chameleon checkpoints: read in any form that they come in, whole, or refused with what is wrong."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from random_chameleons import SIZES, VQ, byte_tokenizer, save, small_chameleon
from safetensors.torch import load_file, save_file
from transformers import ChameleonForConditionalGeneration

from thinkclearly.models.chameleon.checkpoint import load_chameleon
from thinkclearly.models.chameleon.random import random_chameleon
from thinkclearly.models.janus.checkpoint import load_janus
from thinkclearly.models.load import load_checkpoint, load_empty, token_model

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def network(chameleon):
    return load_chameleon(chameleon)


@pytest.fixture
def copy(chameleon, tmp_path):
    return shutil.copytree(chameleon, tmp_path / "copy")


def same(one, other):
    state, expected = one.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def change(path, edit):
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# ---- forms -------------------------------------------------------------------------------------------------------


def test_what_was_made_is_what_is_loaded(network, chameleon):
    checkpoint = small_chameleon()
    assert same(network, checkpoint.network) and not network.training
    assert not any(p.requires_grad for p in network.model.vqmodel.parameters())
    processor = load_checkpoint(str(chameleon)).processor
    assert processor.code_ids == checkpoint.processor.code_ids == sorted(processor.code_ids, reverse=True)
    assert processor.encode_words("A blue cat, 12.", bos=True) == checkpoint.processor.encode_words(
        "A blue cat, 12.", bos=True
    )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(copy, network, suffix):
    state = load_file(copy / FILE)
    (copy / FILE).unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    pattern = f"{stem}{{suffix}}.{suffix}"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size="200KB")
    assert len(split.filename_to_tensors) > 2
    for name, keys in split.filename_to_tensors.items():
        (save_file if suffix == "safetensors" else torch.save)({key: state[key] for key in keys}, copy / name)
    content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (copy / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    assert same(load_chameleon(copy), network)


def test_one_pickle(copy, network):
    torch.save(load_file(copy / FILE), copy / "pytorch_model.bin")
    (copy / FILE).unlink()
    assert same(load_chameleon(copy), network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_image_tokenizer_stays_in_float32_and_gives_the_same_codes(chameleon, network, dtype):
    half = load_chameleon(chameleon, dtype=dtype)
    kinds = {name.startswith("model.vqmodel."): p.dtype for name, p in half.named_parameters()}
    assert kinds == {True: torch.float32, False: dtype}
    assert same(half.model.vqmodel, network.model.vqmodel)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(token_model(half).encode(pixels), token_model(network).encode(pixels))
    known = token_model(network).base_fingerprint()
    assert token_model(half).base_fingerprint() == (known if dtype == torch.bfloat16 else "")


def test_transformers_reads_what_we_save_but_for_the_decoder(chameleon, network):
    native, info = ChameleonForConditionalGeneration.from_pretrained(chameleon, output_loading_info=True)
    assert not info["missing_keys"] and all(".decoder." in key for key in info["unexpected_keys"])
    assert torch.equal(native.lm_head.weight, network.lm_head.weight)


def test_settings_of_sampling_are_not_inherited(copy):
    (copy / "generation_config.json").write_text('{"temperature": 0.7, "top_p": 0.7, "do_sample": false}')
    loaded = load_checkpoint(str(copy))
    assert loaded.network.generation_config.temperature is None and loaded.network.generation_config.top_p is None
    save(loaded, copy / "again")


def test_a_hub_id_loads_like_a_folder(hub, chameleon, network, tmp_path):
    code = (
        "import sys, torch\nfrom huggingface_hub import HfApi\nfrom thinkclearly.models.load import load_checkpoint\n"
        "from thinkclearly.models.load import load_empty\nHfApi().create_repo('you/anole')\n"
        "HfApi().upload_folder(repo_id='you/anole', folder_path=sys.argv[1])\n"
        "assert load_empty('you/anole').lm_head.weight.is_meta\n"
        "torch.save(load_checkpoint('you/anole').network.state_dict(), sys.argv[2])\n"
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_you", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, str(chameleon), str(tmp_path / "state")]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    state = torch.load(tmp_path / "state")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_a_model_without_weights_has_the_same_parts(chameleon, network):
    empty = load_empty(str(chameleon))
    sizes = {name: p.shape for name, p in network.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == sizes
    assert all(p.is_meta for p in empty.parameters())


def test_the_config_alone_tells_how_large_a_model_is(chameleon, tmp_path):
    """Chameleon-7B's sizes, which are the defaults of transformers' config."""
    ids = {
        f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z": code + 4 for code in range(8192)
    }
    config = {"model_type": "chameleon", "vocabulary_map": ids, "vq_config": {"model_type": "chameleon_vqgan"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = token_model(load_empty(str(tmp_path)))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in family.parts().items()}
    assert family.grid == 32 and family.image_size == 512 and family.codebook_size == 8192
    assert count["layers"] + 2 * count["lm_head"] == pytest.approx(7.01e9, rel=1e-3)


# ---- what does not fit -------------------------------------------------------------------------------------------


def without(*parts):
    return lambda state: [state.pop(name) for name in list(state) if any(part in name for part in parts)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without(".decoder."), "no weights of the image tokenizer's decoder.*facebook/chameleon-7b.*Anole"),
        (without("decoder.conv_in"), "2 missing: model.vqmodel.decoder.conv_in.bias"),
        (without("layers.1.mlp.up_proj"), "1 missing: model.layers.1.mlp.up_proj.weight"),
        (lambda state: state.update(extra=torch.zeros(2)), "1 unexpected: extra"),
        (lambda state: state.update({"model.norm.weight": torch.ones(7)}), "1 mismatched: .*model.norm.weight"),
    ],
)
def test_every_key_is_accounted_for(copy, edit, message):
    state = load_file(copy / FILE)
    edit(state)
    save_file(state, copy / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_chameleon(copy)


def swap(words, one, other):
    words[one], words[other] = words[other], words[one]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("vocabulary_map"), "config.json names 0 codes of pictures"),
        (lambda c: c["vocabulary_map"].pop("IMGIMGDZ"), "names 39 codes of pictures .*each of 0 … K - 1 once"),
        (lambda c: c["vocabulary_map"].update(IMGIMGDZ=c["vocabulary_map"]["IMGIMGEZ"]), "with an id of its own"),
        (lambda c: c["vocabulary_map"].update(IMGIMGDZ=10**9), "expected 40 of them .* below"),
        (lambda c: c["vocabulary_map"].update(IMGIMGDZ="3"), "'IMGIMGDZ': '3'; expected"),
        (lambda c: c["vocabulary_map"].update(IMGIMGKZ=3), "'IMGIMGKZ': 3; expected"),
        (lambda c: c.update(vocabulary_map=[1]), "config.json does not describe|vocabulary_map"),
        (lambda c: c["vq_config"].update(num_embeddings=41), "40 codes .*expected 41 of them"),
        (lambda c: swap(c["vocabulary_map"], "IMGIMGDZ", "IMGIMGEZ"), "the tokenizer gives codes .* other ids"),
        (lambda c: c.update(boi_token_id=3), "the tokens around them, other ids than config.json"),
        (lambda c: c["vq_config"].update(resolution=128), "say 64 pixels and 64 tokens .*has 128 and 256"),
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; expected a number from 0"),
        (lambda c: c.update(hidden_size=2048, vocab_size=1 << 17), "describes a model of .* the files hold"),
        (lambda c: c.update(Hidden_Size=32), "has 'hidden_size' and 'Hidden_Size' in one object"),
    ],
)
def test_configs_that_do_not_fit_are_refused(copy, edit, message):
    change(copy / "config.json", edit)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("processor_config.json", lambda c: c.update(image_seq_length=1024), "say 64 pixels and 1024 tokens"),
        ("preprocessor_config.json", lambda c: c.update(rescale_factor=1 / 255), "has rescale_factor 0.0039.*0.0078"),
        ("preprocessor_config.json", lambda c: c.update(image_mean=[0.5] * 3), r"has image_mean \[0.5, 0.5, 0.5\]"),
    ],
)
def test_a_processor_for_other_pictures_is_refused(copy, file, edit, message):
    change(copy / file, edit)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(str(copy))
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {file}"):
        load_checkpoint(str(copy))


def test_a_tokenizer_of_another_family_is_refused(copy, golden):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    for file in (golden / "checkpoint").glob("tokenizer*"):
        shutil.copy(file, copy)
    with pytest.raises(ValueError, match="The tokenizer lacks .*<reserved08706>.*Chameleon, Anole or TwGI"):
        load_checkpoint(str(copy))


def test_families_are_not_taken_for_each_other(chameleon, golden):
    with pytest.raises(ValueError, match="is a Chameleon, not a Janus"):
        load_janus(chameleon)
    with pytest.raises(ValueError, match="is no Chameleon"):
        load_chameleon(golden / "checkpoint")
    with pytest.raises(ValueError, match="a state dict belongs to a Janus base"):
        load_checkpoint(str(chameleon), weights="state.bin")


def test_an_adapter_beside_whole_weights_is_not_passed_over(copy):
    (copy / "adapter_config.json").write_text("{}")
    (copy / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds whole weights and an adapter"):
        load_chameleon(copy)


def test_the_tokenizer_of_a_random_model_has_to_name_its_codes():
    with pytest.raises(ValueError, match="39 codes .*expected 40 of them"):
        random_chameleon(SIZES, VQ, byte_tokenizer(39), seed=0)


# ---- fewer bits, several devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_only_the_layers_are_in_fewer_bits(chameleon, network, bits):
    pytest.importorskip("bitsandbytes")
    config = {f"load_in_{bits}bit": True}
    small = load_chameleon(chameleon, quantization_config=config, device="cpu")
    kind = {8: "Linear8bitLt", 4: "Linear4bit"}[bits]
    found = {name for name, module in small.named_modules() if type(module).__name__ == kind}
    linear = {name for name, module in network.named_modules() if type(module) is torch.nn.Linear}
    assert found == {name for name in linear if name.startswith("model.layers.")}
    assert token_model(small).base_fingerprint() == token_model(network).base_fingerprint()
    ids = torch.tensor([[0, 60, 61, 62]])
    hidden = [
        each.language_model(inputs_embeds=each.embed_words(ids)).last_hidden_state.flatten()
        for each in map(token_model, (network, small))
    ]
    assert torch.cosine_similarity(*hidden, dim=0) > 0.95


def test_layers_may_lie_on_disk_and_the_image_tokenizer_may_not(chameleon, network, tmp_path):
    parts = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "vqmodel", "rotary_emb")} | {"lm_head": "cpu"}
    layers = {f"model.layers.{n}": "disk" for n in range(SIZES["num_hidden_layers"])}
    away = token_model(load_chameleon(chameleon, device_map=parts | layers))
    assert any(p.is_meta for p in away.network.parameters())
    home, ids = token_model(network), torch.tensor([[0, 60, 61, 62]])
    hidden = [each.language_model(inputs_embeds=each.embed_words(ids)).last_hidden_state for each in (home, away)]
    assert torch.equal(*hidden) and away.base_fingerprint() == home.base_fingerprint()
    with pytest.raises(ValueError, match="device_map offloads model.vqmodel.*only the language model"):
        load_chameleon(chameleon, device_map=parts | layers | {"model.vqmodel": "disk"})
