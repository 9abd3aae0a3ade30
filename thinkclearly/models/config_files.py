"""The JSON files of a checkpoint: read, and refused where they claim what cannot be, before anything is built of them.

Knows the names of sizes in configs of Janus (native and DeepSeek's) and Chameleon. Does not know what they are for.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    ChameleonConfig,
    ChameleonVQVAEConfig,
    JanusConfig,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedModel,
)

from thinkclearly.models.weight_files import find_weights, open_weights

# Generous: the largest has 48 layers of 8192 channels, 102,400 words and 16,384 codes.
_COUNTS = dict.fromkeys(
    ("num_hidden_layers", "num_res_blocks", "depth", "num_attention_heads", "num_key_value_heads", "heads")
    + ("num_channels", "in_channels", "out_channels", "channel_multiplier", "patch_size"),
    1024,
)
_WIDTHS = dict.fromkeys(
    ("hidden_size", "intermediate_size", "head_dim", "projection_dim", "embed_dim", "latent_channels", "base_channels")
    + ("image_token_embed_dim", "image_token_embed", "n_embed", "input_dim", "image_size", "mlp_ratio", "resolution"),
    1 << 17,
)
_WORDS = dict.fromkeys(
    ("vocab_size", "num_embeddings", "image_token_size", "num_image_tokens", "image_seq_length"), 1 << 22
)
_LARGEST = _COUNTS | _WIDTHS | _WORDS
CONFIG_NAMES = _LARGEST.keys() | {"architectures", "language_config", "params", "cls", "model_name", "projector_type"}
for _kind in (JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig, ChameleonConfig, ChameleonVQVAEConfig):
    CONFIG_NAMES |= _kind.__dataclass_fields__.keys()
VOCABULARY = "vocabulary_map"  # of a Chameleon config: names are words, numbers are their ids
_PACKED = 16  # a quantised file holds up to 8 weights in a number; tied weights are stored once


def read_json(path: str | Path, object_pairs_hook: Callable[[list[tuple]], dict] | None = None) -> dict:
    """The object in a JSON file; the hook as in `json.loads`.

    Raises:
        ValueError: it is not UTF-8, not JSON (cut short, perhaps), or holds something else than an object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=object_pairs_hook)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Is it cut short? Get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected an object with names and values.")
    return content


def read_config(path: str | Path, known: Collection[str]) -> dict:
    """The object in a JSON file of settings, in which no name can be taken for another.

    Args:
        known: the names that are read; one in other letters ("Lora_alpha") would be ignored without a word.

    Raises:
        ValueError: as [`read_json`]; the same name twice in one object, or in other letters, at any depth.
    """
    path, problems = Path(path), {}

    def look(pairs: list[tuple]) -> dict:
        seen, twice, odd = {}, None, None
        for name, _ in pairs:
            twice = twice or (name.lower() in seen and (seen[name.lower()], name))
            odd = odd or (name not in known and name.lower() in known and name)
            seen[name.lower()] = name
        content = dict(pairs)
        problems[id(content)] = twice, odd
        return content

    content = read_json(path, look)
    objects = [content]
    while objects:
        inside = objects.pop()
        if isinstance(inside, dict):
            _raise_unclear(path, *problems[id(inside)])
            # The words of a vocabulary may well differ by their letters' case alone.
            inside = [value for name, value in inside.items() if name != VOCABULARY]
        objects += inside if isinstance(inside, list) else []
    return content


def _raise_unclear(path: Path, twice: tuple[str, str] | None, odd: str | None) -> None:
    if twice:
        raise ValueError(f"{path} has {' and '.join(map(repr, twice))} in one object; remove one of them.")
    if odd:
        raise ValueError(f"{path} has {odd!r}; expected {odd.lower()!r}, as the names are written.")


def check_sizes(config: dict, where: str | Path) -> None:
    """Raises `ValueError` for a number of layers, channels, words, … that no model of ours has."""
    for name, value in config.items():
        if isinstance(value, dict) and name != VOCABULARY:
            check_sizes(value, where)
        elif name in _LARGEST and value is not None:
            sizes = value if isinstance(value, list) else [value]
            if len(sizes) > 64 or not all(type(n) in (int, float) and 0 <= n <= _LARGEST[name] for n in sizes):
                raise ValueError(
                    f"{where}: {name} is {value!r:.60}; expected a number from 0 to {_LARGEST[name]}. "
                    "The file is damaged or not of such a model: get it again."
                )


def check_claims(folder: Path, empty: PreTrainedModel) -> None:
    """Refuses a config that describes a far larger model than the folder's weights, before memory is taken.

    Args:
        empty: the model that the folder's `config.json` describes, on the meta device.

    Raises:
        ValueError: that, or a weight file that is damaged.
    """
    stored = 0
    for file in find_weights(folder):
        with open_weights(file) as (names, shape, _):
            stored += sum(math.prod(shape(name)) for name in names)
    claimed = sum(p.numel() for p in empty.parameters())
    if claimed > _PACKED * stored:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of {claimed:,} weights, the files hold {stored:,}. Check "
            "that they belong together."
        )


@contextmanager
def config_errors(folder: str | Path) -> Iterator[None]:
    """What torch and transformers raise for a config that no model can be built from, as a `ValueError`."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the many parts of a config raise what they raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(
            f"{folder}/config.json does not describe a model that can be built ({reason}). Get it again."
        ) from error
