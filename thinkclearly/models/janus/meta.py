"""A Janus model without weights, for what can be told from its sizes alone.

Knows where sizes stand in either layout. Does not know what is counted.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

from thinkclearly.models.config_files import config_errors
from thinkclearly.models.janus import deepseek
from thinkclearly.models.weight_files import find_weights, open_weights


def empty_janus(config: dict, folder: Path) -> JanusForConditionalGeneration:
    """The model that a `config.json` describes, on the meta device.

    Args:
        folder: where the config lies; in DeepSeek's layout it may hold the config alone, and the towers then have the
            sizes of those that DeepSeek published.

    Raises:
        ValueError: not the config of a Janus model.
    """
    if config["model_type"] == "multi_modality":
        deepseek.check_name(config, str(folder))
    with config_errors(folder):
        native = JanusConfig.from_dict(config) if config["model_type"] == "janus" else _native(config, folder)
        with torch.device("meta"):
            return JanusForConditionalGeneration(native)


def _native(config: dict, folder: Path) -> JanusConfig:
    """Sizes of DeepSeek's layout: from the headers of the weight files, or else by its published models."""
    try:
        files = find_weights(folder)
    except FileNotFoundError:
        text = LlamaConfig(**{key: value for key, value in config["language_config"].items() if key != "model_type"})
        width = text.hidden_size
        return JanusConfig(
            text_config=text,
            vision_config={"projection_dim": width},
            vq_config={"projection_dim": width, "image_token_embed_dim": width},
            tie_word_embeddings=False,
        )
    shapes = {}
    for file in files:
        with open_weights(file) as (names, shape, _):
            shapes |= {name: shape(name) for name in names}
    return deepseek.native_config(config, shapes, str(folder))
