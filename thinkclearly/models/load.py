"""From a name to a model of whichever family its config.json says, and from transformers' model to its family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import PreTrainedModel

from thinkclearly.models.chameleon.checkpoint import check_vocabulary, empty_chameleon, load_chameleon
from thinkclearly.models.chameleon.model import Chameleon
from thinkclearly.models.chameleon.processor import ChameleonProcessor
from thinkclearly.models.folder import BY_NAME, read_family, read_model_config
from thinkclearly.models.janus.checkpoint import load_janus
from thinkclearly.models.janus.meta import empty_janus
from thinkclearly.models.janus.model import Janus
from thinkclearly.models.janus.processor import JanusProcessor
from thinkclearly.models.protocol import Processor, TokenModel


@dataclass
class Checkpoint:
    """transformers' model and the processor that belongs to it."""

    network: PreTrainedModel
    processor: Processor

    @property
    def token_model(self) -> TokenModel:
        return token_model(self.network)


def token_model(network: PreTrainedModel) -> TokenModel:
    """transformers' model (without PEFT around it) as its family's `TokenModel`."""
    if network.config.model_type == "janus":
        return Janus(network)
    if network.config.model_type == "chameleon":
        return Chameleon(network)
    raise ValueError(f"model_type {network.config.model_type!r}; expected 'janus' or 'chameleon'")


def load_checkpoint(
    name_or_path: str, *, revision: str | None = None, token: str | None = None, **kwargs
) -> Checkpoint:
    """Loads a checkpoint of Janus (transformers' or DeepSeek's layout) or Chameleon with its processor.

    Args:
        name_or_path: folder or Hub id; "tiny" (a Janus) and "tiny_chameleon" ship with this package.
        kwargs: `dtype`, `device`, `attn_implementation`, `device_map`, `quantization_config`, `weights`; see
            `load_janus` and `load_chameleon`.

    Raises:
        FileNotFoundError, ValueError: as these two, or the processor is for pictures of another size.
    """
    path = str(BY_NAME.get(str(name_or_path), name_or_path))
    # Read first: another family is named before its tokenizer is found wanting.
    hub = {"revision": revision, "token": token}
    _, config = read_model_config(path, **hub)
    if config["model_type"] == "chameleon":
        if kwargs.pop("weights", None) is not None:
            raise ValueError(f"{path} is a Chameleon; a state dict belongs to a Janus base in DeepSeek's layout.")
        processor = ChameleonProcessor.from_pretrained(path, **hub)
        network = load_chameleon(path, **hub, **kwargs)
        check_vocabulary(network, processor, path)
    else:
        processor = JanusProcessor.from_pretrained(path, **hub)
        network = load_janus(path, **hub, **kwargs)
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
    """The model that a checkpoint's `config.json` describes, on the meta device.

    Args:
        name_or_path: as for `load_checkpoint`; of a Hub id only `config.json` is downloaded.

    Raises:
        FileNotFoundError: no config there. ValueError: not one of our families.
    """
    folder = Path(BY_NAME.get(str(name_or_path), name_or_path))
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(str(name_or_path), "config.json", revision=revision)).parent
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"The config.json of {name_or_path} cannot be read ({str(error).splitlines()[0]}). Offline, "
                "give --base_model a folder that holds it; weights are not needed."
            ) from error
    config = read_family(folder / "config.json")
    return (empty_chameleon if config["model_type"] == "chameleon" else empty_janus)(config, folder)
