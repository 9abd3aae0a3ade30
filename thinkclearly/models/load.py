"""From a name to a model of whichever family its config.json says, and from transformers' model to its family."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from thinkclearly.models.janus.checkpoint import load_janus
from thinkclearly.models.janus.folder import TINY, read_janus_config
from thinkclearly.models.janus.meta import empty_janus
from thinkclearly.models.janus.model import Janus
from thinkclearly.models.janus.processor import JanusProcessor
from thinkclearly.models.protocol import TokenModel


@dataclass
class Checkpoint:
    """transformers' model and the processor that belongs to it."""

    network: PreTrainedModel
    processor: JanusProcessor

    @property
    def token_model(self) -> TokenModel:
        return token_model(self.network)


def token_model(network: PreTrainedModel) -> TokenModel:
    """transformers' model (without PEFT around it) as its family's `TokenModel`."""
    if network.config.model_type == "janus":
        return Janus(network)
    raise ValueError(f"model_type {network.config.model_type!r}; expected 'janus'")


def load_checkpoint(
    name_or_path: str, *, revision: str | None = None, token: str | None = None, **kwargs
) -> Checkpoint:
    """Loads a native or DeepSeek-format Janus checkpoint with its processor.

    Args:
        name_or_path: folder or Hub id; "tiny" is the model that ships with this package.
        kwargs: `dtype`, `device`, `attn_implementation`, `device_map`, `quantization_config`, `weights`; see
            `load_janus`.

    Raises:
        FileNotFoundError, ValueError: as `load_janus`, or the processor is for pictures of another size.
    """
    path = str(TINY) if name_or_path == "tiny" else str(name_or_path)
    read_janus_config(path, revision, token)  # another family is named before its tokenizer is found wanting
    processor = JanusProcessor.from_pretrained(path, revision=revision, token=token)
    network = load_janus(path, revision=revision, token=token, **kwargs)
    family = token_model(network)
    expected = family.image_size, family.grid**2
    found = processor.image_size, processor.num_image_tokens
    if found != expected:
        raise ValueError(
            f"{path}: preprocessor_config.json and processor_config.json say {found[0]} pixels and {found[1]} tokens "
            f"a picture, the model has {expected[0]} and {expected[1]}. Get the files that belong together."
        )
    return Checkpoint(network.eval(), processor)


def load_empty(name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """The model that a checkpoint's `config.json` describes, on the meta device; see `empty_janus`."""
    return empty_janus(name_or_path, revision)
