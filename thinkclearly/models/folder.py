"""Where a checkpoint's files lie, and which family its `config.json` belongs to. Knows no weights."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from thinkclearly.models.config_files import CONFIG_NAMES, check_sizes, read_config, read_json
from thinkclearly.models.janus import deepseek

logger = logging.getLogger(__name__)

TINY = Path(__file__).parents[1] / "tiny_janus"
BY_NAME = {"tiny": TINY, "tiny_chameleon": TINY.parent / "tiny_chameleon"}  # bases that ship with this package
FAMILIES = {  # by the `model_type` of their configs
    "janus": "Janus in transformers' layout",
    "multi_modality": "DeepSeek's Janus, Janus-Pro, Janus-4o",
    "chameleon": "Chameleon, Anole, TwGI",
}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def resolve(
    name_or_path: str | Path,
    revision: str | None = None,
    token: str | None = None,
    patterns: Iterable[str] | None = None,
) -> Path:
    """A folder as it is; of a Hub id the cached files (those of `patterns`) that do not lie in folders of their own.

    Raises:
        FileNotFoundError: neither, or the Hub cannot be asked.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    options = {"revision": revision, "token": token, "allow_patterns": patterns and list(patterns)}
    try:  # checkpoints with their optimizer states, samples and the like lie in folders
        return Path(snapshot_download(str(name_or_path), ignore_patterns=["*/*"], **options))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is neither a folder nor a Hub repository that can be read now; check the name, the token "
            "and the connection."
        ) from error


def weights_folder(name_or_path: str | os.PathLike, revision: str | None = None, token: str | None = None) -> Path:
    """The folder with a checkpoint's weights; of a Hub id safetensors are downloaded, or else `.bin`."""
    folder = resolve(name_or_path, revision, token, ["*.safetensors"])
    if Path(name_or_path).is_dir() or any(folder.glob("*.safetensors")):
        return folder
    return resolve(name_or_path, revision, token, ["*.bin"])


def read_model_config(
    name_or_path: str | os.PathLike, revision: str | None = None, token: str | None = None
) -> tuple[Path, dict]:
    """The folder with a checkpoint's small files, and its `config.json`.

    Raises:
        FileNotFoundError: no such folder or config. ValueError: it cannot be read, or is of another family.
    """
    folder = resolve(name_or_path, revision, token, ("*.json", *TOKENIZER_FILES))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; expected a checkpoint of Janus or Chameleon.")
    config = read_family(folder / "config.json")
    if config["model_type"] == "multi_modality":
        deepseek.check_family(config, str(folder))
    return folder, config


def read_family(path: Path) -> dict:
    """A `config.json` of one of our families; errors as in `read_model_config`."""
    config = read_config(path, CONFIG_NAMES)
    if (model_type := config.get("model_type")) not in list(FAMILIES):  # which may be unhashable
        found = "; ".join(f"{name!r} ({of})" for name, of in FAMILIES.items())
        raise ValueError(f"{path} has model_type {model_type!r}; expected one of {found}.")
    check_sizes(config, path)
    return config


def check_adapter(folder: Path, model_type: str) -> None:
    """An adapter beside whole weights must not be passed over; its settings alone say nothing."""
    if not (folder / "adapter_config.json").is_file():
        return
    if found := [file.name for file in folder.glob("adapter_model*")]:
        raise ValueError(
            f"{folder} holds whole weights and an adapter ({found[0]}): which of the two is meant cannot be told. "
            "Move the adapter_* files to a folder of their own, or remove them."
        )
    if model_type != "multi_modality":
        raise ValueError(
            f"{folder} has an adapter_config.json, but no adapter beside it; transformers would look for one. Remove "
            "that file."
        )
    logger.info("%s has an adapter_config.json, but no adapter: loading the whole weights beside it.", folder)


def read_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
