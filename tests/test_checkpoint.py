"""Checkpoints in and out: every layout that there is gives the same model, and a damaged one an error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from janus_reference import CODEBOOK, adapted, same
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration

from thinkclearly.models.janus.checkpoint import from_deepseek, load_janus
from thinkclearly.models.janus.export import export_deepseek
from thinkclearly.models.weight_files import find_weights


@pytest.fixture(scope="module")
def model(golden):
    return load_janus(golden / "checkpoint")


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A copy of the golden checkpoint to damage."""
    return Path(shutil.copytree(golden / "checkpoint", tmp_path / "checkpoint"))


# ---- the ways in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_native_save_and_load_is_exact(golden, tmp_path, dtype):
    model = load_janus(golden / "checkpoint", dtype=dtype)
    model.save_pretrained(tmp_path)
    again = load_janus(tmp_path, dtype=dtype)
    assert type(again) is JanusForConditionalGeneration and not again.training
    assert same(model, again)
    assert again.generation_config.generation_kwargs == model.generation_config.generation_kwargs
    assert not any(p.requires_grad for p in again.model.vqmodel.parameters())


@torch.no_grad()
def test_native_checkpoint_with_raw_codebook(golden, tmp_path, model, weights):
    upstream = load_janus(golden / "checkpoint")
    upstream.model.vqmodel.quantize.embedding.weight.copy_(weights[CODEBOOK])
    upstream.save_pretrained(tmp_path)
    assert same(load_janus(tmp_path), model)


def test_native_checkpoint_keeps_its_tie(model, tmp_path):
    config = JanusConfig(**(model.config.to_dict() | {"tie_word_embeddings": True}))
    torch.manual_seed(0)
    JanusForConditionalGeneration(config).save_pretrained(tmp_path)
    tied = load_janus(tmp_path)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize("change", ("missing", "unexpected"))
def test_native_checkpoint_must_be_complete(golden, tmp_path, change):
    load_janus(golden / "checkpoint").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del state["model.generation_embeddings.weight"]
    else:
        state["model.generation_embeddings.other"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 {change}: model.generation_embeddings"):
        load_janus(tmp_path)


@pytest.mark.parametrize("zipped", (True, False))
def test_single_bin(checkpoint, model, weights, zipped):
    torch.save(weights, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (checkpoint / "model.safetensors").unlink()
    assert same(load_janus(checkpoint), model)


@pytest.mark.parametrize("content", ['{"weights": {}}', "[", '{"weight_map": {"a": "../other.safetensors"}}'])
def test_an_index_that_is_none_or_leads_elsewhere_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json"):
        find_weights(tmp_path)


@pytest.mark.parametrize("index", (True, False))
@pytest.mark.parametrize("suffix", ("safetensors", "bin"))
def test_shards(checkpoint, model, weights, suffix, index):
    (checkpoint / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    where = {}
    for i in range(3):
        part = {key: weights[key] for key in list(weights)[i::3]}
        file = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        save_file(part, checkpoint / file) if suffix == "safetensors" else torch.save(part, checkpoint / file)
        where |= dict.fromkeys(part, file)
    if index:
        (checkpoint / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(load_janus(checkpoint), model)
    (checkpoint / f"{stem}-00002-of-00003.{suffix}").unlink()
    with pytest.raises(
        FileNotFoundError if index else ValueError, match="00002-of-00003" if index else "missing|no tensor"
    ):
        load_janus(checkpoint)


def test_from_deepseek_in_memory(golden, model, weights):
    config = json.loads((golden / "checkpoint" / "config.json").read_text())
    state = {key: tensor.float() for key, tensor in weights.items()}
    theirs = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: config), state_dict=lambda: state)
    ours = from_deepseek(theirs)
    assert same(ours, model)
    state[CODEBOOK].zero_()
    state["gen_embed.weight"].zero_()
    assert same(ours, model)


def fake_hub(monkeypatch, repository, cache):
    """Stands for the Hub: downloads into `cache` what the patterns allow of `repository`."""

    def download(name, allow_patterns, ignore_patterns, **_):
        cache.mkdir(exist_ok=True)
        for file in filter_repo_objects(
            [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()],
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            shutil.copy(repository / file, cache / file)
        return str(cache)

    monkeypatch.setattr("thinkclearly.models.folder.snapshot_download", download)


@pytest.mark.parametrize("kind", ("safetensors", "both", "bin"))
def test_hub_id_downloads_one_kind_of_weights(checkpoint, tmp_path, monkeypatch, model, weights, kind):
    if kind != "safetensors":
        torch.save(weights, checkpoint / "pytorch_model.bin")
    if kind == "bin":
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / "modeling_evil.py").write_text("raise SystemExit")
    fake_hub(monkeypatch, checkpoint, tmp_path / "cache")
    loaded = load_janus("someone/some-janus")
    assert same(loaded, model) and loaded.config.image_token_id == model.config.image_token_id
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert ("pytorch_model.bin" in names) == (kind == "bin") and "modeling_evil.py" not in names


def test_unreachable_hub_id(monkeypatch):
    def download(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("thinkclearly.models.folder.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        load_janus("outputs/misspelt")


# ---- what must not load ------------------------------------------------------------------------------------------


_QKV = "vision_model.vision_tower.blocks.1.attn.qkv.bias"
_POSITIONS = "vision_model.vision_tower.pos_embed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"gen_embed.extra": torch.zeros(2)}),
            r"1 unexpected: gen_embed.extra \(in model.safetens",
        ),
        (
            lambda s: s.update({"another.thing": torch.zeros(2)}),
            r"1 unexpected: another.thing \(in model.safetensors\)",
        ),
        (lambda s: s.pop("language_model.lm_head.weight"), "1 missing: language_model.lm_head.weight"),
        (lambda s: s.pop(_QKV), f"1 missing: {_QKV}"),
        (lambda s: s.pop("gen_vision_model.quant_conv.weight"), "has no tensor 'gen_vision_model.quant_conv.weight'"),
        (
            lambda s: s.update({"gen_embed.weight": s["gen_embed.weight"][1:].clone()}),
            r"1 mismatched: gen_embed.weight \(\d+, \d+\) \(in model.safetensors\)",
        ),
        (lambda s: s.update({_QKV: torch.zeros(4)}), rf"1 mismatched: {_QKV} \(4,\)"),
        (lambda s: s.update({_POSITIONS: s[_POSITIONS][:, 1:].clone()}), r"pos_embed has \d+ positions"),
    ],
)
def test_keys_must_match_one_to_one(checkpoint, weights, change, message):
    state = dict(weights)
    change(state)
    save_file(state, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_janus(checkpoint)
    assert str(checkpoint) in str(error.value)


def edit_config(checkpoint, change):
    config = json.loads((checkpoint / "config.json").read_text())
    change(config)
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(vision_und_enc_config={}, vision_gen_enc_config={}), "JanusFlow.*vision_gen_enc_config"),
        (lambda c: c.pop("gen_head_config"), "lacks gen_head_config"),
        (lambda c: c["aligner_config"]["params"].update(projector_type="linear"), "projector_type 'linear'"),
        (lambda c: c["vision_config"]["params"].update(model_name="sam_b"), "tower is 'sam_b'"),
        (lambda c: c["vision_config"]["params"].update(pixel_mean=[0.5] * 3), "pixel_mean"),
        (lambda c: c["language_config"].update(num_hidden_layers=1), "unexpected: language_model.model.layers.1"),
        (lambda c: c["language_config"].update(vocab_size=7), "mismatched: language_model.lm_head.weight"),
        (lambda c: c.update(model_type="llava"), "model_type 'llava'; expected one of 'janus'"),
    ],
)
def test_configs_that_are_something_else(checkpoint, change, message):
    edit_config(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        load_janus(checkpoint)


def test_absent_files(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        load_janus(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights; expected model.safetensors"):
        load_janus(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_janus(checkpoint)


def test_quantisation_needs_a_native_checkpoint(golden):
    with pytest.raises(ValueError, match="thinkclearly convert"):
        load_janus(golden / "checkpoint", quantization_config=object())
    with pytest.raises(ValueError, match="give one of them"):
        load_janus(golden / "checkpoint", device="cpu", device_map="auto")


# ---- the way out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ("5GB", "500KB"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_export_round_trip(golden, tmp_path, weights, dtype, shard):
    model = load_janus(golden / "checkpoint", dtype=dtype)
    out = export_deepseek(model, tmp_path / "out", golden / "checkpoint", max_shard_size=shard)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 1 if shard == "5GB" else len(files) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = load_janus(out, dtype=dtype)
    assert same(model, again)
    assert again.config.to_dict() | {"_name_or_path": 0} == model.config.to_dict() | {"_name_or_path": 0}
    assert again.generation_config.to_dict() == model.generation_config.to_dict()

    theirs = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert {key for key in weights if ".attn_pool." not in key} == theirs.keys()
    for key, tensor in theirs.items():
        reference = F.normalize(weights[key].float(), dim=-1) if key == CODEBOOK else weights[key]
        assert torch.equal(tensor.float(), reference.float()), key
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (golden / "checkpoint" / name).read_bytes()


def test_export_writes_deepseeks_config(model, golden, tmp_path):
    out = export_deepseek(model, tmp_path / "out")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (out, golden / "checkpoint"))
        for key in theirs.keys() - {"transformers_version", "torch_dtype"}:
            if isinstance(theirs[key], dict):
                wanted, found = (
                    {**part[key], **part[key].get("params", {}), "params": None} for part in (theirs, ours)
                )
                assert wanted.items() <= found.items(), (name, key)
            else:
                assert theirs[key] == ours[key], (name, key)


def test_export_refuses(model, golden, tmp_path):
    (tmp_path / "something").write_text("kept")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_deepseek(model, tmp_path)
    with pytest.raises(TypeError, match="Linear"):
        export_deepseek(torch.nn.Linear(1, 1), tmp_path / "out")
    finetuned, _, _ = adapted(golden, golden / "finetune")
    with pytest.raises(ValueError, match="adapters in it"):
        export_deepseek(finetuned.get_base_model(), tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        export_deepseek(model, tmp_path / "out", tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_other_architectures_survive_the_round_trip(model, tmp_path):
    """No residual blocks in the encoder, odd MLP widths, grouped heads, scaled RoPE, three projector layers."""
    config = model.config.to_dict()
    levels = len(config["vq_config"]["channel_multiplier"])
    multipliers = [1] * (levels - 1) + [3]
    config["vq_config"] |= {"num_res_blocks": 0, "channel_multiplier": multipliers, "num_hidden_layers": 3}
    hidden = config["vision_config"]["hidden_size"]
    config["vision_config"] |= {"mlp_ratio": 43.5 / hidden, "num_attention_heads": 2, "depth": 3}
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    grouped = config["text_config"]["num_attention_heads"] // 2
    config["text_config"] |= {"num_key_value_heads": grouped, "rope_parameters": rope}
    torch.manual_seed(0)
    other = JanusForConditionalGeneration(JanusConfig(**config))
    export_deepseek(other, tmp_path / "out")
    again = load_janus(tmp_path / "out")
    assert again.config.vision_config.num_attention_heads == 2
    assert again.config.text_config.rope_parameters == other.config.text_config.rope_parameters
    assert torch.equal(again.model.language_model.rotary_emb.inv_freq, other.model.language_model.rotary_emb.inv_freq)
    codebook = other.model.vqmodel.quantize.embedding.weight
    codebook.data = F.normalize(codebook.data, dim=-1)
    assert same(other, again)


# ---- memory ------------------------------------------------------------------------------------------------------

_MEASURE = """
import gc, sys, threading, time, torch
from thinkclearly.models.janus.checkpoint import load_janus

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

for folder in sys.argv[1:]:
    gc.collect()
    start, peak, done = anonymous(), 0, threading.Event()
    def watch():
        global peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_janus(folder)
    done.set()
    thread.join()
    print((max(peak, anonymous()) - start) / sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's RssAnon")
def test_loading_needs_one_copy_of_the_weights(model, tmp_path):
    config = model.config.to_dict()
    config["text_config"] |= {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 128}
    config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    config["vision_config"] |= {"projection_dim": 512}
    config["vq_config"] |= {"projection_dim": 512, "image_token_embed_dim": 512}
    big = JanusForConditionalGeneration(JanusConfig(**config))
    export_deepseek(big, tmp_path / "safetensors", max_shard_size="40MB")
    shutil.copytree(tmp_path / "safetensors", tmp_path / "bin")
    for file in (tmp_path / "bin").glob("*.safetensors"):
        torch.save(load_file(file), file.with_name(f"pytorch_{file.stem}.bin"))
        file.unlink()
    (tmp_path / "bin" / "model.safetensors.index.json").unlink()
    command = [sys.executable, "-c", _MEASURE, tmp_path / "safetensors", tmp_path / "bin"]
    # Freed memory goes back at once: what malloc keeps of the first model would hide the second.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ratios = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert len(ratios) == 2 and all(0.5 < float(ratio) < 1.3 for ratio in ratios), ratios
