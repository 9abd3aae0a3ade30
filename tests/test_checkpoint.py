"""Checkpoints in and out, against values computed by DeepSeek's own classes (tests/fixtures/janus_tiny/README.md)."""

import importlib.util
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
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from thinkclearly.models import deepseek
from thinkclearly.models.checkpoint import export_deepseek, from_deepseek, load_janus
from thinkclearly.models.original_finetune import check_original_base, is_original_finetune, read_original_finetune
from thinkclearly.models.weight_files import find_weights

NAMES = ("square", "landscape", "portrait")
TOLERANCE = {"rtol": 0, "atol": 1e-4}
CODEBOOK = "gen_vision_model.quantize.embedding.weight"


@pytest.fixture(scope="module")
def expected(golden):
    return load_file(golden / "expected.safetensors")


@pytest.fixture(scope="module")
def expected_finetune(golden):
    return load_file(golden / "expected_finetune.safetensors")


@pytest.fixture(scope="module")
def model(golden):
    return load_janus(golden / "checkpoint")


@pytest.fixture(scope="module")
def weights(golden):
    return load_file(golden / "checkpoint" / "model.safetensors")


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A copy of the golden checkpoint to damage."""
    return Path(shutil.copytree(golden / "checkpoint", tmp_path / "checkpoint"))


@pytest.fixture
def finetune(golden, tmp_path):
    return Path(shutil.copytree(golden / "finetune", tmp_path / "finetune"))


def special_ids(golden):
    added = json.loads((golden / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {item["content"]: item["id"] for item in added}
    names = {"image": "<image_placeholder>", "boi": "<begin_of_image>", "eoi": "<end_of_image>", "pad": "<｜▁pad▁｜>"}
    return SimpleNamespace(**{name: ids[text] for name, text in names.items()})


def encode(model, pixel_values):
    return model.model.vqmodel.encode(pixel_values[None]).image_tokens


def fill(embeds, mask, values):
    return embeds.masked_scatter(mask.unsqueeze(-1), values)


def edit_embeds(model, golden, expected, name):
    """The three guidance rows, full, part and uncond: (3, L, H); specs: ShareGPT-4o-Image's inference."""
    ids, special = expected[f"{name}.edit.input_ids"], special_ids(golden)
    uncond = ids.clone()
    uncond[1:-1] = special.pad
    full, uncond = (model.get_input_embeddings()(row) for row in (ids, uncond))
    features = model.model.get_image_features(expected[f"{name}.pixel_values"][None]).pooler_output
    part = fill(full, ids == special.image, features)
    codes = model.prepare_embeddings_for_image_generation(encode(model, expected[f"{name}.pixel_values"]))
    return torch.stack([fill(part, ids == special.pad, codes), part, uncond])


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_image_side_is_deepseeks(model, expected, name):
    pixels = expected[f"{name}.pixel_values"]
    tokens = encode(model, pixels)
    assert torch.equal(tokens, expected[f"{name}.image_tokens"])
    picture = model.model.vqmodel.decode(tokens[None])[0]
    torch.testing.assert_close(picture, expected[f"{name}.reconstruction"], **TOLERANCE)
    features = model.model.get_image_features(pixels[None]).pooler_output[0]
    torch.testing.assert_close(features, expected[f"{name}.image_features"], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_edit_logits_are_deepseeks(model, golden, expected, name):
    embeds = edit_embeds(model, golden, expected, name)
    mask = expected[f"{name}.edit.attention_mask"]
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, -1]
    logits = model.model.generation_head(hidden)
    torch.testing.assert_close(logits, expected[f"{name}.edit.row_logits"][0], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_understanding_logits_are_deepseeks(model, expected, name):
    ids = expected[f"{name}.understand.input_ids"][None]
    logits = model(input_ids=ids, pixel_values=expected[f"{name}.pixel_values"][None]).logits[0, -1]
    torch.testing.assert_close(logits, expected[f"{name}.understand.next_token_logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ("t2i_a", "t2i_b"))
def test_native_generate_draws_deepseeks_tokens(model, expected, name):
    ids = expected[f"{name}.input_ids"][None]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", guidance_scale=5.0)
    assert torch.equal(tokens[0], expected[f"{name}.greedy_tokens"])


@torch.no_grad()
def test_nothing_is_left_on_meta_or_random(model):
    tensors = [*model.state_dict().items(), *model.named_non_persistent_buffers()]
    assert not [name for name, tensor in tensors if tensor.device.type != "cpu"]
    fresh = JanusForConditionalGeneration(model.config)
    for (name, buffer), (_, other) in zip(model.named_non_persistent_buffers(), fresh.named_non_persistent_buffers()):
        assert buffer.dtype == other.dtype and torch.equal(buffer, other), name
    assert not model.training and not any(p.requires_grad for p in model.model.vqmodel.parameters())


def test_embeddings_and_head_are_two_tensors(model, weights):
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert torch.equal(embeddings, weights["language_model.model.embed_tokens.weight"].float())
    assert torch.equal(head, weights["language_model.lm_head.weight"].float())
    assert not torch.equal(embeddings, head)


@torch.no_grad()
def test_codebook_is_normalised_and_embeddings_are_not(model, weights):
    codebook = model.model.vqmodel.quantize.embedding.weight
    raw = weights[CODEBOOK].float()
    assert (raw.norm(dim=-1) - 1).abs().max() > 0.01
    assert torch.equal(codebook, F.normalize(raw, dim=-1))
    assert torch.equal(model.model.generation_embeddings.weight, weights["gen_embed.weight"].float())


def test_config_comes_from_shapes_and_tokenizer(model, golden, weights):
    theirs = json.loads((golden / "checkpoint" / "config.json").read_text())
    config, special = model.config, special_ids(golden)
    assert config.image_token_id == special.image
    assert config.vision_config.image_size == theirs["vision_config"]["params"]["image_size"]
    assert config.vision_config.num_image_tokens == weights["vision_model.vision_tower.pos_embed"].shape[1]
    assert config.vq_config.num_embeddings == theirs["gen_vision_config"]["params"]["image_token_size"]
    assert config.text_config.num_hidden_layers == theirs["language_config"]["num_hidden_layers"]
    assert config.tie_word_embeddings is False
    assert model.generation_config.generation_kwargs == {"boi_token_id": special.boi}
    assert model.generation_config.pad_token_id == special.pad


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "heads", "listed"),
    [(2048, 5632, 24, 16, True), (4096, 11008, 30, 32, False)],
    ids=("1B", "7B"),
)
def test_janus_pro_sizes(hidden, intermediate, layers, heads, listed):
    """The published sizes; the 7B's config.json leaves what LlamaConfig defaults to unsaid."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    language = {"max_position_embeddings": 16384, "num_hidden_layers": layers, "vocab_size": 102400}
    vision = JanusVisionConfig(projection_dim=hidden)
    vq = JanusVQVAEConfig(projection_dim=hidden, image_token_embed_dim=hidden)
    native = JanusConfig(
        text_config=LlamaConfig(**sizes, **language), vision_config=vision, vq_config=vq, tie_word_embeddings=False
    )
    with torch.device("meta"):
        state = JanusForConditionalGeneration(native).state_dict()
    groups = {}
    for key, tensor in state.items():
        groups.setdefault(deepseek.deepseek_key(key), []).append(tensor)
    shapes = {key: tuple(deepseek.to_deepseek(key, parts).shape) for key, parts in groups.items()}
    assert shapes["vision_model.vision_tower.blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["gen_vision_model.decoder.conv_blocks.4.res.2.conv1.weight"] == (128, 128, 3, 3)
    theirs = deepseek.deepseek_config(native, torch.bfloat16)
    theirs["language_config"] = (
        language | {"model_type": "llama", "torch_dtype": "bfloat16"} | (sizes if listed else {})
    )
    del theirs["vision_config"]["params"]["heads"]
    ours = deepseek.native_config(theirs, shapes, "Janus-Pro")
    for part in ("text_config", "vision_config", "vq_config"):
        ours_part, part = getattr(ours, part).to_dict(), getattr(native, part).to_dict()
        assert ours_part | {"dtype": None} == part | {"dtype": None}


@torch.no_grad()
def test_half_precision_leaves_the_tokenizer_alone(golden, model, expected):
    half = load_janus(golden / "checkpoint", dtype=torch.bfloat16)
    vq = half.model.vqmodel
    assert half.dtype == torch.bfloat16 and {p.dtype for p in vq.parameters()} == {torch.float32}
    assert {p.dtype for name, p in half.named_parameters() if "vqmodel" not in name} == {torch.bfloat16}
    assert half.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert same(vq, model.model.vqmodel)
    for name in NAMES:
        assert torch.equal(encode(half, expected[f"{name}.pixel_values"]), expected[f"{name}.image_tokens"])


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

    monkeypatch.setattr("thinkclearly.models.checkpoint.snapshot_download", download)


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

    monkeypatch.setattr("thinkclearly.models.checkpoint.snapshot_download", download)
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
        (lambda c: c.update(model_type="llava"), "model_type 'llava'; expected 'janus'"),
    ],
)
def test_configs_that_are_something_else(checkpoint, change, message):
    edit_config(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        load_janus(checkpoint)


def test_absent_files(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
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
    config, _, _, _ = read_original_finetune(golden / "finetune")
    adapted = get_peft_model(load_janus(golden / "checkpoint"), config).get_base_model()
    with pytest.raises(ValueError, match="adapters in it"):
        export_deepseek(adapted, tmp_path / "out")
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
from thinkclearly.models.checkpoint import load_janus

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


# ---- the original's fine-tunes -----------------------------------------------------------------------------------


def adapted(golden, directory):
    model = load_janus(golden / "checkpoint")
    check_original_base(directory, model)
    config, lora, weight, bias = read_original_finetune(directory)
    model = get_peft_model(model, config)
    result = set_peft_model_state_dict(model, lora)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return model.eval(), weight, bias


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_finetune_teacher_logits_are_the_originals(golden, expected, expected_finetune, name):
    model, weight, bias = adapted(golden, golden / "finetune")
    janus = model.get_base_model()
    prefix = edit_embeds(janus, golden, expected, name)[:1]
    clear, target = expected_finetune[f"{name}.clear_labels"], expected_finetune[f"{name}.target_tokens"]
    fed_back = torch.where(clear, expected[f"{name}.image_tokens"], target)[None]
    embeds = torch.cat([prefix, janus.prepare_embeddings_for_image_generation(fed_back)], dim=1)
    start = prefix.shape[1] - 1
    hidden = janus.model.language_model(inputs_embeds=embeds).last_hidden_state[0, start : start + fed_back.shape[1]]
    logits = torch.cat([janus.model.generation_head(hidden), F.linear(hidden, weight, bias)], dim=-1)
    torch.testing.assert_close(logits, expected_finetune[f"{name}.teacher_logits"], **TOLERANCE)
    labels = torch.where(clear, logits.shape[-1] - 1, target)
    for clear_weight in (0.3, 1.0):
        classes = torch.ones(logits.shape[-1])
        classes[-1] = clear_weight
        reference = expected_finetune[f"{name}.loss.filled.clear_weight_{clear_weight}"]
        torch.testing.assert_close(F.cross_entropy(logits, labels, classes), reference, **TOLERANCE)


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


# ---- DeepSeek's own classes, where they are installed --------------------------------------------------------------


def _deepseek_installed():
    # PyPI's `janus` is a queue library; only DeepSeek's package has `janus.models`.
    return importlib.util.find_spec("janus") is not None and importlib.util.find_spec("janus.models") is not None


@pytest.mark.skipif(not _deepseek_installed(), reason="DeepSeek's janus package is not installed")
@torch.no_grad()
def test_live_against_deepseek(model, golden, weights, expected, tmp_path, monkeypatch):
    from functools import partial

    from janus.models import modeling_vlm, siglip_vit, vq_model

    vision, vq = model.config.vision_config, model.config.vq_config
    tower = json.loads((golden / "checkpoint" / "config.json").read_text())["vision_config"]["params"]["model_name"]
    sizes = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "mlp_ratio": vision.mlp_ratio,
    }
    monkeypatch.setitem(siglip_vit.SigLIP_MODEL_CONFIG, tower, siglip_vit.SigLIP_MODEL_CONFIG[tower] | sizes)
    for coder in ("Encoder", "Decoder"):
        narrow = partial(getattr(vq_model, coder), ch=vq.base_channels, num_res_blocks=vq.num_res_blocks)
        monkeypatch.setattr(vq_model, coder, narrow)
    multipliers = list(vq.channel_multiplier)
    arguments = vq_model.ModelArgs(
        codebook_size=vq.num_embeddings,
        codebook_embed_dim=vq.embed_dim,
        encoder_ch_mult=multipliers,
        decoder_ch_mult=multipliers,
        z_channels=vq.latent_channels,
    )
    monkeypatch.setitem(vq_model.VQ_models, "VQ-16", lambda: vq_model.VQModel(arguments))

    export_deepseek(model, tmp_path / "out")
    for folder in (golden / "checkpoint", tmp_path / "out"):
        config = modeling_vlm.MultiModalityConfig(**json.loads((folder / "config.json").read_text()))
        theirs = modeling_vlm.MultiModalityCausalLM(config).float().eval()
        state = load_file(folder / "model.safetensors")
        result = theirs.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=False)
        assert not result.unexpected_keys
        assert all(".attn_pool." in key for key in result.missing_keys)
        ours = from_deepseek(theirs)
        assert same(ours, model)
        for name in NAMES:
            pixels = expected[f"{name}.pixel_values"][None]
            tokens = theirs.gen_vision_model.encode(pixels)[2][2]
            assert torch.equal(encode(ours, pixels[0]), tokens.flatten())
            features = theirs.aligner(theirs.vision_model(pixels))
            torch.testing.assert_close(ours.model.get_image_features(pixels).pooler_output, features, **TOLERANCE)
            embeds = edit_embeds(ours, golden, expected, name)
            hidden = theirs.language_model.model(inputs_embeds=embeds).last_hidden_state
            mine = ours.model.language_model(inputs_embeds=embeds).last_hidden_state
            torch.testing.assert_close(mine, hidden, **TOLERANCE)
            torch.testing.assert_close(ours.model.generation_head(mine), theirs.gen_head(hidden), **TOLERANCE)
