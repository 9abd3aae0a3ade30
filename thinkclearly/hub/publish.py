"""`thinkclearly push`: a fine-tune, merged weights or prepared data as a repository on the Hub; and data back again.

Knows which files belong in a repository and what must not leave the machine. The words of the card are `hub.card`'s.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME

from thinkclearly.data.encode import DATASET_FILES, INFO_FILE, Preparation
from thinkclearly.files import BUILT_IN, is_local, write_json, write_text
from thinkclearly.hub.card import (
    CARD_FILE,
    RECIPE_FILE,
    SHAPES,
    data_name,
    dataset_card,
    model_card,
    read_recipe,
    run_of,
    step_of,
)
from thinkclearly.models.config_files import VOCABULARY
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.models.folder import BY_NAME
from thinkclearly.models.instruction_head import ADAPTER_FILE, CONFIG_FILE, HEAD_FILE, LOCAL_BASE, read_base_name
from thinkclearly.models.janus.export import export_deepseek
from thinkclearly.models.janus.original_finetune import write_original_finetune

logger = logging.getLogger(__name__)

PIPELINE_FILE = "clear_edit_pipeline.py"
REQUIRED = (HEAD_FILE, CONFIG_FILE, "config.json")
PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
WEIGHT_FILES = (
    *(ADAPTER_FILE, "adapter_model.safetensors", "generation_config.json", "model.safetensors"),
    *("model-*-of-*.safetensors", "model.safetensors.index.json"),
)
# What a push replaces: an older one's files that it does not bring itself go, others' stay.
REPLACED = {
    "model": (
        *(*REQUIRED, *PROCESSOR_FILES, *WEIGHT_FILES),
        *(PIPELINE_FILE, RECIPE_FILE, "samples/step_*.png", "original/*"),
    ),
    "dataset": (INFO_FILE, *DATASET_FILES),
}
SAMPLES = 8
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_LOCAL_PATH = re.compile(r'"((?:/|[A-Za-z]:\\\\)[^"/\\]+[/\\][^"]*)"')


def push(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str = "Push by thinkclearly",
    **options,
) -> CommitInfo:
    """Uploads a fine-tune or prepared data. Given again it sends only what is not there yet.

    Args:
        directory: what `thinkclearly train` wrote, a checkpoint in it, or a folder of prepared data.
        repo_id: created where it does not exist; a folder of prepared data becomes a data set.
        private: for a new repository; the account's default where not given.
        revision: branch, created where it does not exist.
        create_pr: open a pull request instead of committing.
        token: the one that `hf auth login` stored, or HF_TOKEN, where not given.
        options: for a fine-tune, those of `staged`.

    Raises:
        FileNotFoundError, ValueError: the folder is neither, or something in it must not be published.
        PermissionError: the Hub does not take the token.
    """
    directory = Path(directory)
    if "/" not in repo_id:
        repo_id = f"{HfApi(token=token).whoami()['name']}/{repo_id}"
    if (directory / INFO_FILE).is_file():
        of_models = ("base_model_id", "license", "share_samples", "pt", "merged")
        if unused := [name for name in of_models if options.get(name)]:
            raise ValueError(f"{directory} holds prepared data, for which {unused[0]} means nothing; leave it out")
        stage, kind = _staged_data(directory, repo_id), "dataset"
    else:
        stage, kind = staged(directory, repo_id, **options), "model"
    with stage as folder:
        return upload(folder, repo_id, kind, private, revision, create_pr, token, message)


def upload(
    folder: Path,
    repo_id: str,
    kind: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    message: str = "Push by thinkclearly",
) -> CommitInfo:
    """Every file of `folder` into the repository, in one commit that also removes what an earlier push left there.

    `huggingface_hub` leaves out what is there already. Adapter and merged weights, or shards of two data sets, would
    otherwise lie side by side: transformers and our own loaders take a folder with both for an adapter, and read all
    shards.
    """
    api = HfApi(token=token, library_name="thinkclearly")
    target = {"repo_type": kind, "revision": revision}
    try:
        repo_id = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True).repo_id
        base = read_base_name(folder) if (folder / ADAPTER_FILE).is_file() else None
        for name in BUILT_IN:
            if base == built_in_id(repo_id, name):
                _share_built_in(api, base, name, private)
        if revision and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            delete_patterns=list(REPLACED[kind]),
            create_pr=create_pr,
            commit_message=message,
            **target,
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"The Hub at {api.endpoint} refuses to write to {repo_id}: {error.server_message or error}. Log in with "
            "`hf auth login` or set HF_TOKEN to a token that may write there."
        ) from error
    except httpx.TransportError as error:
        raise ConnectionError(
            f"The connection to the Hub at {api.endpoint} failed: {error}. Give the same command again."
        ) from error


@contextmanager
def staged(
    directory: str | Path,
    repo_id: str,
    *,
    base_model_id: str | None = None,
    license: str | None = None,
    share_samples: bool | None = None,
    pt: bool = False,
    merged: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> Iterator[Path]:
    """A temporary folder (TMPDIR) with exactly the files of the repository; linked, not copied, on the same disk.

    Args:
        base_model_id: Hub id of the base model, where training used a local folder.
        license: as the Hub names it; what the base model's page says where not given.
        share_samples: whether the sample edits go along, which show held-out pictures and instructions; where not
            given, if anyone can see the data: the built-in shapes, and public data sets of the Hub.
        pt: add `original/`, the same fine-tune for the original script.
        merged: "native" or "deepseek": whole weights in that layout, and no adapter.
        dtype, max_shard_size: of merged weights.

    Raises:
        FileNotFoundError: no fine-tune. ValueError: a local path or a token would be published.
    """
    directory = Path(directory).absolute()
    _check_complete(directory)
    kind = _read_json(directory / "config.json").get("model_type")
    if (pt or merged == "deepseek") and kind != "janus":
        raise ValueError(
            f"{directory} is a fine-tune of a {kind}; --merged deepseek and --pt write layouts of Janus. Leave them "
            "out, or use --merged native."
        )
    base = base_model_of(directory, base_model_id)
    base = built_in_id(repo_id, base) if base in BUILT_IN else base
    with tempfile.TemporaryDirectory(prefix="thinkclearly-push-") as temporary:
        folder = Path(temporary) / "repository"
        if merged:
            merge(directory, folder, merged, dtype, max_shard_size)
        else:
            folder.mkdir()
            _link(directory, folder, (*REQUIRED, *PROCESSOR_FILES, *WEIGHT_FILES))
            if (folder / ADAPTER_FILE).is_file():
                settings = _read_json(folder / ADAPTER_FILE) | {"base_model_name_or_path": base}
                write_json(folder / ADAPTER_FILE, settings)
        if (folder / ADAPTER_FILE).is_file():  # else pipeline() would ask for trust_remote_code, imported or not
            write_json(folder / "config.json", pipeline_config(_read_json(folder / "config.json")))
            shutil.copy(Path(__file__).parent / "remote_pipeline.py", folder / PIPELINE_FILE)
        if recipe := read_recipe(directory):
            recipe |= {"base_model": base_model_id} if base_model_id else {}
            write_text(folder / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False))
        samples = samples_of(directory)
        if samples and not (is_public(recipe) if share_samples is None else share_samples):
            logger.info("The sample edits stay here: they show your data. --share_samples true shares them.")
            samples = []
        _link(run_of(directory), folder, samples)
        if pt:
            model, _ = load_clear_model(directory)
            write_original_finetune(model, folder / "original")
            settings = _read_json(folder / "original" / ADAPTER_FILE) | {"base_model_name_or_path": base}
            write_json(folder / "original" / ADAPTER_FILE, settings)
        licenses = {"license": license} if license else license_of(base)
        is_adapter = (folder / ADAPTER_FILE).is_file()
        model_card(directory, repo_id, base, samples, licenses, is_adapter).save(folder / CARD_FILE)
        check_publishable(folder)
        yield folder


@contextmanager
def staged_checkpoint(directory: str | Path) -> Iterator[Path]:
    """A temporary folder with a whole checkpoint, optimizer and random states included: another machine resumes it."""
    directory = Path(directory)
    with tempfile.TemporaryDirectory(prefix="thinkclearly-push-") as temporary:
        folder = Path(temporary)
        files = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
        _link(directory, folder, [str(name) for name in files if str(name) not in (CARD_FILE, LOCAL_BASE)])
        state = _read_json(folder / TRAINER_STATE_NAME) | {"best_model_checkpoint": None}  # a folder of this machine
        write_text(folder / TRAINER_STATE_NAME, json.dumps(state, indent=2) + "\n")
        check_publishable(folder)
        yield folder


def base_model_of(directory: Path, base_model_id: str | None) -> str | None:
    """The base model as others can find it; None for whole weights, which need none.

    Raises:
        ValueError: training used a local folder, and `base_model_id` does not say what that is on the Hub.
    """
    if base_model_id is not None:
        return base_model_id
    if not (directory / ADAPTER_FILE).is_file():
        return None
    base = read_base_name(directory)
    if not base or is_local(base):
        raise ValueError(
            f"{directory} has the base model {base!r}, which nobody else can load. Say what it is on the Hub with "
            "--base_model_id owner/name."
        )
    return base


def samples_of(directory: Path) -> list[str]:
    """The newest sample edits of a run; of a checkpoint the ones that its own weights made. Names below the run."""
    step = step_of(directory)
    pattern = "step_*.png" if step is None else f"step_{step:06d}.png"
    found = sorted((path.name for path in (run_of(directory) / "samples").glob(pattern)), reverse=True)
    return [f"samples/{name}" for name in found[:SAMPLES]]


def is_public(recipe: dict) -> bool:
    """Whether anyone can see a run's data: the built-in shapes, or a data set that the Hub shows without a token."""
    name = data_name(recipe)
    if name == SHAPES or "/" not in name:
        return name == SHAPES
    try:
        info = HfApi(token=False).dataset_info(name)
    except (HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled, HFValidationError):
        return False
    return not info.private and not info.gated


def built_in_id(repo_id: str, name: str) -> str:
    """Where a model that ships along lies for those who load `repo_id`: `pipeline()` looks the base up on the Hub."""
    return f"{repo_id.rpartition('/')[0] or 'you'}/thinkclearly-{BY_NAME[name].name.replace('_', '-')}"


def _share_built_in(api: HfApi, repo_id: str, name: str, private: bool | None) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if not api.file_exists(repo_id, "model.safetensors"):
        message = f"The {BY_NAME[name].name.replace('_', ' ')} that thinkclearly ships"
        api.upload_folder(repo_id=repo_id, folder_path=BY_NAME[name], commit_message=message)


def license_of(base: str | None) -> dict[str, str]:
    """What the base model's page on the Hub says of its license; nothing where it cannot be read."""
    if base is None:
        return {}
    try:
        card = HfApi().model_info(base).card_data or {}
    except (HfHubHTTPError, httpx.TransportError):
        return {}
    return {name: card[name] for name in ("license", "license_name", "license_link") if card.get(name)}


def pipeline_config(base_config: dict) -> dict:
    """The `config.json` of a repository: the base model's, and where `pipeline("clear-edit")` finds its code.

    The model class is named under `architectures`, which `pipeline()` reads after the repository's own file has made
    it known (hub/remote_pipeline.py); under `pt` it would be looked up before.
    """
    impl = f"{PIPELINE_FILE.removesuffix('.py')}.ClearEditPipeline"
    pipelines = {"clear-edit": {"impl": impl, "pt": [], "type": "multimodal"}}
    return {**base_config, "architectures": ["ClearEditModel"], "custom_pipelines": pipelines}


def merge(directory: Path, folder: Path, layout: str, dtype: torch.dtype, max_shard_size: str) -> None:
    """Whole weights of a fine-tune, LoRA added in, with CLEAR head and processor; peak memory is one copy of them."""
    model, processor = load_clear_model(directory, dtype=dtype)
    source = model.base.name_or_path
    if isinstance(model.network, PeftModel):
        model.network = model.network.merge_and_unload()
    if layout == "deepseek":
        # The tokenizer files as they are: transformers 5 would write a class that DeepSeek's code does not find.
        export_deepseek(model.base, folder, processor_source=source, max_shard_size=max_shard_size)
    else:
        model.base.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
    _link(directory, folder, (HEAD_FILE, CONFIG_FILE))


def check_publishable(folder: Path) -> None:
    """Raises `ValueError` where a text file of `folder` holds a Hub token, or a JSON file a path of this machine."""
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".md", ".yaml", ".py") or path.name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8")
        if path.name == "config.json":  # words of a vocabulary may look like paths
            text = json.dumps(json.loads(text) | {VOCABULARY: None})
        if _TOKEN.search(text):
            raise ValueError(f"{path.name} holds what looks like a Hub token; take it out before the folder is pushed")
        if path.suffix == ".json" and (found := _LOCAL_PATH.search(text)):
            raise ValueError(f"{path.name} holds {found[1]}, a path of this machine; take it out or write a Hub id")


@contextmanager
def _staged_data(directory: Path, repo_id: str) -> Iterator[Path]:
    info = _read_json(directory / INFO_FILE) | {"skipped": None}  # names of files, perhaps
    with tempfile.TemporaryDirectory(prefix="thinkclearly-push-") as temporary:
        folder = Path(temporary)
        _link(directory, folder, DATASET_FILES)
        write_json(folder / INFO_FILE, info)
        dataset_card(repo_id, Preparation(**info)).save(folder / CARD_FILE)
        check_publishable(folder)
        yield folder


def _check_complete(directory: Path) -> None:
    missing = [name for name in REQUIRED if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}: expected a folder that `thinkclearly train` wrote, or one of "
            f"prepared data with {INFO_FILE}."
        )


def _link(source: Path, target: Path, patterns) -> None:
    """Files that match a pattern, as hard links: weights are large, and a checkpoint may be rotated away meanwhile.

    To change one, replace it (`thinkclearly.files`): writing into it would write into the original.
    """
    for path in [path for pattern in patterns for path in source.glob(pattern)]:
        name = path.relative_to(source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target / name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, target / name)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
