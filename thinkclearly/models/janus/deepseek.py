"""The names and numbers of DeepSeek's Janus layout, and of the native one, without reading or writing any file.

DeepSeek's `config.json` leaves out most of the architecture (its code has it), so the native config is derived from
the shapes of the weights. What is not in the shapes is stated where it is used.
"""

import math
import re

import torch
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

IMAGE_TAG, BOI_TAG, EOI_TAG, PAD_TAG = "<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<｜▁pad▁｜>"

CODEBOOK = "model.vqmodel.quantize.embedding.weight"

# (DeepSeek, native) module prefixes, most specific first; `*` is a number which both sides share, in order.
_PREFIXES = [
    ("vision_model.vision_tower.patch_embed.proj", "model.vision_model.embeddings.patch_embedding"),
    ("vision_model.vision_tower.blocks.*.norm1", "model.vision_model.encoder.layers.*.layer_norm1"),
    ("vision_model.vision_tower.blocks.*.norm2", "model.vision_model.encoder.layers.*.layer_norm2"),
    ("vision_model.vision_tower.blocks.*.attn.proj", "model.vision_model.encoder.layers.*.self_attn.projection_layer"),
    ("vision_model.vision_tower.blocks.*.mlp", "model.vision_model.encoder.layers.*.mlp"),
    ("vision_model.vision_tower.norm", "model.vision_model.post_layernorm"),
    ("aligner.layers.0", "model.aligner.fc1"),
    ("gen_aligner.layers.0", "model.generation_aligner.fc1"),
    # A projector is Linear, GELU, Linear, …: its linears have even numbers, the native list counts from the second.
    *((f"aligner.layers.{2 * i + 2}", f"model.aligner.hidden_layers.{i}") for i in range(4)),
    *((f"gen_aligner.layers.{2 * i + 2}", f"model.generation_aligner.hidden_layers.{i}") for i in range(4)),
    ("gen_embed", "model.generation_embeddings"),
    ("gen_head.output_mlp_projector", "model.generation_head.proj_out"),
    ("gen_head.vision_head", "model.generation_head.vision_head"),
    *(
        (f"gen_vision_model.{coder}.{theirs}", f"model.vqmodel.{coder}.{ours}")
        for coder, levels in (("encoder", "down"), ("decoder", "up"))
        for theirs, ours in (
            ("conv_blocks.*.res", f"{levels}.*.block"),
            ("conv_blocks", levels),
            ("mid.0", "mid.block_1"),
            ("mid.1", "mid.attn_1"),
            ("mid.2", "mid.block_2"),
        )
    ),
    ("gen_vision_model", "model.vqmodel"),
    ("language_model.model", "model.language_model"),
    ("language_model.lm_head", "lm_head"),
]
_DROPPED = re.compile(
    r"vision_model\.vision_tower\.attn_pool\..*|gen_vision_model\.quantize\.codebook_used|.*\.rotary_emb\.inv_freq"
)
_POSITIONS = ("vision_model.vision_tower.pos_embed", "model.vision_model.embeddings.position_embedding.weight")
_QKV = re.compile(r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_Q_K_V = re.compile(r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)")


def _rules(source: int) -> list[tuple[re.Pattern, str]]:
    rules = []
    for pair in _PREFIXES:
        pattern = re.escape(pair[source]).replace(r"\*", r"(\d+)")
        first, *others = pair[1 - source].split("*")
        replacement = first + "".join(f"\\g<{number}>{part}" for number, part in enumerate(others, 1))
        rules.append((re.compile(pattern + r"(?=\.)"), replacement))
    return rules


_TO_NATIVE, _TO_DEEPSEEK = _rules(0), _rules(1)


def _rename(key: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, replacement in rules:
        if match := pattern.match(key):
            return match.expand(replacement) + key[match.end() :]
    return None


def to_native(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The native parameters that one DeepSeek tensor holds, as views of it.

    `{}` for a tensor that native Janus has no use for (`attn_pool`, `codebook_used`), `None` for an unknown name.
    SigLIP's fused `qkv` (3D, …) becomes three (D, …); its `pos_embed` (1, N, D) becomes (N, D).
    """
    if _DROPPED.fullmatch(key):
        return {}
    if key == _POSITIONS[0]:
        return {_POSITIONS[1]: tensor.squeeze(0)}
    if match := _QKV.fullmatch(key):
        prefix = f"model.vision_model.encoder.layers.{match[1]}.self_attn"
        return {f"{prefix}.{name}_proj.{match[2]}": part for name, part in zip("qkv", tensor.chunk(3))}
    name = _rename(key, _TO_NATIVE)
    return None if name is None else {name: tensor}


def deepseek_key(key: str) -> str | None:
    """DeepSeek's name of the tensor that keeps a native parameter; `None` when its layout has no place for it."""
    if key == _POSITIONS[1]:
        return _POSITIONS[0]
    if match := _Q_K_V.fullmatch(key):
        return f"vision_model.vision_tower.blocks.{match[1]}.attn.qkv.{match[2]}"
    return _rename(key, _TO_DEEPSEEK)


def to_deepseek(key: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of [`to_native`]: one DeepSeek tensor from its native parameters, q, k and v in that order."""
    if key == _POSITIONS[0]:
        return parts[0].unsqueeze(0)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def native_config(config: dict, shapes: dict[str, tuple[int, ...]], source: str) -> JanusConfig:
    """The native config of a DeepSeek checkpoint.

    Args:
        config (`dict`): DeepSeek's `config.json`.
        shapes (`dict[str, tuple[int, ...]]`): the shape of every tensor of the checkpoint.
        source (`str`): where the checkpoint is, for errors.

    Sizes and depths come from the shapes, the image size from the config (checked against the number of positions),
    the language model from `language_config`, whose absent fields are `LlamaConfig`'s defaults as in DeepSeek's code.
    The number of SigLIP heads is in neither: `vision_config.params.heads` if it is there (our exports write it,
    DeepSeek's code ignores it), else 16, which both towers that DeepSeek's code knows have, but never heads narrower
    than 16 channels.

    Raises:
        ValueError: JanusFlow, a tower or a projector that native Janus does not have, a missing key, contradictions.
    """
    check_family(config, source)

    def shape(key):
        if key not in shapes:
            raise ValueError(
                f"{source} has no tensor {key!r} among its {len(shapes)}. A DeepSeek Janus checkpoint must have it: "
                "check that every weight file was downloaded."
            )
        return shapes[key]

    def count(prefix):
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({match[1] for key in shapes if (match := pattern.match(key))})

    text = LlamaConfig(**{key: value for key, value in config["language_config"].items() if key != "model_type"})

    tower = "vision_model.vision_tower"
    hidden, channels, patch, _ = shape(f"{tower}.patch_embed.proj.weight")
    mlp = shape(f"{tower}.blocks.0.mlp.fc1.weight")[0]
    positions = shape(_POSITIONS[0])[1]
    vision = config["vision_config"]["params"]
    image_size = vision.get("image_size", math.isqrt(positions) * patch)
    if (image_size // patch) ** 2 != positions:
        raise ValueError(
            f"{source}: config.json says image_size {image_size}, which makes {(image_size // patch) ** 2} patches of "
            f"{patch} pixels, but pos_embed has {positions} positions. Correct vision_config.params.image_size."
        )
    ratio = mlp / hidden
    vision_config = JanusVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=count(f"{tower}.blocks"),
        num_attention_heads=vision.get("heads") or max(1, min(16, hidden // 16)),
        num_channels=channels,
        image_size=image_size,
        patch_size=patch,
        # The native MLP is int(hidden * ratio) wide; half a channel more keeps the product from rounding below.
        mlp_ratio=ratio if int(hidden * ratio) == mlp else (mlp + 0.5) / hidden,
        projection_dim=shape("aligner.layers.0.weight")[0],
        depth=count("aligner.layers"),
        num_image_tokens=positions,
    )

    vq = "gen_vision_model"
    base, in_channels = shape(f"{vq}.encoder.conv_in.weight")[:2]
    levels = count(f"{vq}.decoder.conv_blocks")
    if image_size // 2 ** (levels - 1) != image_size // patch:
        raise ValueError(
            f"{source}: the tokenizer of {levels} levels makes a grid of {image_size // 2 ** (levels - 1)} tokens a "
            f"side, SigLIP one of {image_size // patch}. Native Janus needs the two to be equal."
        )
    widths = [shape(f"{vq}.decoder.conv_blocks.{level}.res.0.conv2.weight")[0] for level in reversed(range(levels))]
    embed_dim, latent = shape(f"{vq}.quant_conv.weight")[:2]
    vq_config = JanusVQVAEConfig(
        embed_dim=embed_dim,
        num_embeddings=shape(f"{vq}.quantize.embedding.weight")[0],
        latent_channels=latent,
        in_channels=in_channels,
        base_channels=base,
        channel_multiplier=[width // base for width in widths],
        num_res_blocks=count(f"{vq}.decoder.conv_blocks.0.res") - 1,
        out_channels=shape(f"{vq}.decoder.conv_out.weight")[0],
        projection_dim=shape("gen_aligner.layers.0.weight")[0],
        num_hidden_layers=count("gen_aligner.layers"),
        image_token_embed_dim=shape("gen_head.output_mlp_projector.weight")[1],
    )
    # Tied is JanusConfig's default, DeepSeek's heads are not: tying would silently replace the word embeddings.
    return JanusConfig(
        text_config=text,
        vision_config=vision_config,
        vq_config=vq_config,
        image_token_id=config.get("image_token_id", JanusConfig.image_token_id),
        tie_word_embeddings=False,
    )


def check_name(config: dict, source: str) -> None:
    """Raises `ValueError` for JanusFlow and deepseek-vl, which have the same `model_type` as Janus."""
    if flow := sorted({"vision_und_enc_config", "vision_gen_enc_config", "vision_gen_dec_config"} & set(config)):
        raise ValueError(
            f"{source} is a JanusFlow checkpoint (its config.json has {', '.join(flow)}): it makes images with a "
            "rectified flow and has no codebook tokens, so there is nothing for an instruction token to stand for. "
            "Use a Janus, Janus-Pro or Janus-4o checkpoint."
        )
    if not any(name.startswith("gen_") for name in config) and "vision_config" in config:
        raise ValueError(
            f"{source} is a deepseek-vl checkpoint (its config.json has no gen_vision_config, gen_aligner_config or "
            "gen_head_config): it looks at pictures but cannot make any. Use a Janus, Janus-Pro or Janus-4o "
            "checkpoint."
        )


def check_family(config: dict, source: str) -> None:
    """Raises `ValueError` for a `config.json` of DeepSeek's that is not a Janus model with codebook tokens.

    JanusFlow and deepseek-vl have the same `model_type`. A tower or projector that native Janus does not have, too.
    """
    check_name(config, source)
    parts = ("vision_config", "aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config")
    if missing := [part for part in (*parts, "language_config") if not isinstance(config.get(part), dict)]:
        raise ValueError(f"{source}/config.json lacks {', '.join(missing)}; DeepSeek's Janus layout has them all.")
    for part in parts:
        if not isinstance(params := config[part].get("params", {}), dict):
            raise ValueError(
                f"{source}/config.json: params of {part} is {params!r:.60}; expected a table. Get it again."
            )
    vision = config["vision_config"].get("params", {})
    if not str(vision.get("model_name", "siglip")).startswith("siglip"):
        raise ValueError(
            f"{source}: the vision tower is {vision['model_name']!r}; native Janus has SigLIP towers only."
        )
    if vision.get("pixel_mean") is not None or vision.get("select_layers"):
        raise ValueError(
            f"{source}: vision_config has pixel_mean or select_layers; native Janus neither normalises pixels inside "
            "the tower nor joins layers."
        )
    for name in ("aligner_config", "gen_aligner_config"):
        kind = config[name].get("params", {}).get("projector_type", "mlp_gelu")
        if kind != "mlp_gelu":
            raise ValueError(f"{source}: {name} has projector_type {kind!r}; native Janus has 'mlp_gelu' only.")


def deepseek_config(config: JanusConfig, dtype: torch.dtype) -> dict:
    """DeepSeek's `config.json` of a native model, with every language field written out."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    rope = dict(text.rope_parameters or {})
    theta = rope.pop("rope_theta", 10000.0)
    language = {
        name: getattr(text, name)
        for name in (
            *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings"),
            *("initializer_range", "rms_norm_eps", "attention_bias", "attention_dropout", "mlp_bias"),
            *("bos_token_id", "eos_token_id", "pad_token_id"),
        )
    }
    language |= {
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    projector = {"projector_type": "mlp_gelu"}
    tower = "large" if vision.patch_size == 16 else "so400m"
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "image_token_id": config.image_token_id,
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": vision.image_size,
                "model_name": f"siglip_{tower}_patch{vision.patch_size}_384",
                "select_feature": "same",
                "select_layer": -1,
                "heads": vision.num_attention_heads,
            },
        },
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {"depth": vision.depth, "input_dim": vision.hidden_size, "n_embed": vision.projection_dim}
            | projector,
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": vq.num_embeddings, "n_embed": vq.embed_dim},
        },
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {"depth": vq.num_hidden_layers, "input_dim": vq.embed_dim, "n_embed": vq.projection_dim}
            | projector,
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {
                "image_token_embed": vq.projection_dim,
                "image_token_size": vq.num_embeddings,
                "n_embed": vq.image_token_embed_dim,
            },
        },
        "language_config": language,
    }


def processor_configs(config: JanusConfig) -> dict[str, dict]:
    """DeepSeek's two processor files, by name, as Janus-Pro ships them but for the sizes."""
    return {
        "preprocessor_config.json": {
            "background_color": [127, 127, 127],
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "VLMImageProcessor",
            "image_size": config.vision_config.image_size,
            "image_std": [0.5, 0.5, 0.5],
            "min_size": 14,
            "processor_class": "VLChatProcessor",
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": IMAGE_TAG,
            "mask_prompt": True,
            "num_image_tokens": config.vision_config.num_image_tokens,
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        },
    }
