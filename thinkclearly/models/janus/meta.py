"""A Janus model without weights, for what can be told from its sizes alone.

Knows where sizes stand in either layout. Does not know what is counted.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

from thinkclearly.models.config_files import CONFIG_NAMES, check_sizes, config_errors, read_config
from thinkclearly.models.janus import deepseek
from thinkclearly.models.janus.folder import TINY
from thinkclearly.models.weight_files import find_weights, open_weights


def empty_janus(name_or_path: str, revision: str | None = None) -> JanusForConditionalGeneration:
    """The model that `config.json` describes, on the meta device.

    Args:
        name_or_path: as for `load_checkpoint`; of a Hub id only `config.json` is downloaded. A folder in DeepSeek's
            layout may hold `config.json` alone; its towers then have the sizes of those that DeepSeek published.

    Raises:
        FileNotFoundError: no config there. ValueError: not one of a Janus model.
    """
    folder = TINY if name_or_path == "tiny" else Path(name_or_path)
    if folder.is_dir():
        path = folder / "config.json"
    else:
        try:
            path = Path(hf_hub_download(str(name_or_path), "config.json", revision=revision))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"The config.json of {name_or_path} cannot be read ({str(error).splitlines()[0]}). Offline, "
                "give --base_model a folder that holds it; weights are not needed."
            ) from error
    config = read_config(path, CONFIG_NAMES)
    check_sizes(config, path)
    if config.get("model_type") == "multi_modality":
        deepseek.check_name(config, str(path.parent))
    with config_errors(path.parent):
        native = JanusConfig.from_dict(config) if config.get("model_type") == "janus" else _native(config, path.parent)
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
