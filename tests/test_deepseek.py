"""Configuration, tokens and logits against DeepSeek's own classes (tests/fixtures/janus_tiny/README.md)."""

import importlib.util
import json

import pytest
import torch
from janus_reference import CODEBOOK, adapted, edit_embeds, encode, pictures_of, same, special_ids, t2i_keys
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from thinkclearly.models.janus import deepseek
from thinkclearly.models.janus.checkpoint import from_deepseek, load_janus
from thinkclearly.models.janus.export import export_deepseek

pytestmark = pytest.mark.golden
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def model(golden):
    return load_janus(golden / "checkpoint")


@torch.no_grad()
def test_image_side_is_deepseeks(model, expected, name):
    pixels = expected[f"{name}.pixel_values"]
    tokens = encode(model, pixels)
    assert torch.equal(tokens, expected[f"{name}.image_tokens"])
    picture = model.model.vqmodel.decode(tokens[None])[0]
    torch.testing.assert_close(picture, expected[f"{name}.reconstruction"], **TOLERANCE)
    features = model.model.get_image_features(pixels[None]).pooler_output[0]
    torch.testing.assert_close(features, expected[f"{name}.image_features"], **TOLERANCE)


@torch.no_grad()
def test_edit_logits_are_deepseeks(model, golden, expected, name):
    embeds = edit_embeds(model, golden, expected, name)
    mask = expected[f"{name}.edit.attention_mask"]
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, -1]
    logits = model.model.generation_head(hidden)
    torch.testing.assert_close(logits, expected[f"{name}.edit.row_logits"][0], **TOLERANCE)


@torch.no_grad()
def test_understanding_logits_are_deepseeks(model, expected, name):
    ids = expected[f"{name}.understand.input_ids"][None]
    logits = model(input_ids=ids, pixel_values=expected[f"{name}.pixel_values"][None]).logits[0, -1]
    torch.testing.assert_close(logits, expected[f"{name}.understand.next_token_logits"], **TOLERANCE)


def test_native_generate_draws_deepseeks_tokens(model, expected):
    for key in t2i_keys(expected):
        ids = expected[f"{key}.input_ids"][None]
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", guidance_scale=5.0)
        assert torch.equal(tokens[0], expected[f"{key}.greedy_tokens"])


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
    for name in pictures_of(expected):
        assert torch.equal(encode(half, expected[f"{name}.pixel_values"]), expected[f"{name}.image_tokens"])


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
        for name in pictures_of(expected):
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
