"""Source pictures as the model takes them in: squares, or what the frozen vision tower makes of them, kept on disk.

Features depend on the picture alone, so a training run may compute them once instead of in every epoch. One file a
picture, named by its bytes, in a folder named by the tower: labels, splits and order may change, and processes share
the work without talking. Knows nothing of prompts or labels.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from thinkclearly.data.sources import BadRecord
from thinkclearly.files import replacing
from thinkclearly.images import ImageError, Letterbox, load_image
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor

logger = logging.getLogger(__name__)

BATCH = 16  # pictures that the tower sees at once


def pictures_of(row: dict) -> list[dict]:
    """The encoded pictures that a record shows, `{"bytes", "path"}` each; an edit has one, in `source`."""
    if "sources" in row:
        return row["sources"]
    source = row.get("source") or {}
    return [source] if source.get("bytes") or source.get("path") else []


def source_square(picture: dict, key: str, image_size: int) -> Image.Image:
    """A record's picture fitted into the model's square; `BadRecord` where it cannot be read."""
    try:
        loaded = load_image(picture, f"{key}: source")
    except ImageError as error:
        raise BadRecord(str(error)) from error
    return Letterbox(*loaded.size, image_size).fit(loaded)


class FeatureCache:
    """Features of source pictures on disk, before the aligner: its output is wider (at 7B 4.7 MB, before it 1.2 MB).

    Args:
        folder: holds `<SHA-256 of the encoded picture>.safetensors`, each a tensor (N, W).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, picture: dict, key: str) -> Path:
        """Where the features of a record's picture are or will be."""
        try:
            content = picture["bytes"] or Path(picture["path"]).read_bytes()
        except OSError as error:
            raise BadRecord(f"{key}: source {picture['path']} cannot be read: {error.strerror}") from error
        return self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"

    def read(self, named: Iterable[tuple[str, dict]]) -> torch.Tensor:
        """Features (M, N, W) of M (key of the record, picture), in the type they were stored in."""
        return torch.stack([self._read(picture, key) for key, picture in named])

    def _read(self, picture: dict, key: str) -> torch.Tensor:
        path = self.path(picture, key)
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError) as error:
            raise BadRecord(
                f"{key}: no features of its picture in {path} ({error}). Remove the file if it is there and start "
                "again: what is missing is computed."
            ) from error


@torch.no_grad()
def cache_features(
    parts: list[Dataset], model: InstructionModel, processor: Processor, directory: str | Path
) -> FeatureCache:
    """Computes what is not there yet; every process its share.

    The tower runs in the type of its own weights, as inference runs it: mixed precision would keep some of its
    operations in float32.

    Args:
        parts: prepared splits with the column `source` or `sources`.
        directory: gets a sub-folder `features-…` named by the tower's weights and the geometry.

    Raises:
        ValueError: the tower learns, so its features would change, or there are no pictures.
        BadRecord: a record has no picture.
    """
    tower = model.token_model.parts()[model.token_model.tower_part]
    if processor.sees_codes:
        raise ValueError("cache_features: this model sees pictures by their codes, which are stored; leave it out")
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError("cache_features: the vision tower is trained here; leave cache_features out, or freeze it")
    columns = [[name for name in ("key", "source", "sources") if name in part.column_names] for part in parts]
    if any(len(names) < 2 for names in columns):
        raise ValueError("cache_features: the data has tokens alone and no pictures; leave cache_features out")
    cache = FeatureCache(Path(directory) / f"features-{_fingerprint(tower, processor)}")
    cache.folder.mkdir(parents=True, exist_ok=True)
    state, count = PartialState(), sum(map(len, parts))
    width, dtype = tower.config.hidden_size, next(tower.parameters()).dtype
    gigabytes = count * processor.num_image_tokens * width * dtype.itemsize / 1e9
    if state.is_main_process:
        logger.info("Features of %d records go to %s: %.2f GB for one picture each", count, cache.folder, gigabytes)
    was_training = tower.training
    tower.eval()
    with tqdm(total=count, desc="features", unit="record", disable=not state.is_main_process) as bar:
        for part, names in zip(parts, columns):
            pictures = part.select_columns(names)
            for start in range(state.process_index * BATCH, len(part), state.num_processes * BATCH):
                rows = pictures.select(range(start, min(start + BATCH, len(part)))).to_list()
                _fill(cache, rows, model, processor)
                bar.update(len(rows) * state.num_processes)
    tower.train(was_training)
    state.wait_for_everyone()
    return cache


def _fill(cache: FeatureCache, rows: list[dict], model: InstructionModel, processor: Processor) -> None:
    named = [(row["key"], picture) for row in rows for picture in pictures_of(row)]
    empty = [row["key"] for row in rows if "source" in row and not pictures_of(row)]
    if empty:
        raise BadRecord(f"{', '.join(empty)}: no source picture; leave cache_features out, or these records")
    missing = {path: (key, picture) for key, picture in named if not (path := cache.path(picture, key)).exists()}
    if not missing:
        return
    squares = [source_square(picture, key, processor.image_size) for key, picture in missing.values()]
    features = model.token_model.see(processor.pixel_values(squares).to(model.device)).cpu()
    for path, values in zip(missing, features):
        with replacing(path) as temporary:
            save_file({"features": values.clone()}, temporary)


def _fingerprint(tower: torch.nn.Module, processor: Processor) -> str:
    """Names what features follow from besides the picture: the tower's weights, their type, and the geometry."""
    geometry = (processor.image_size, processor.image_mean, processor.image_std)
    digest = hashlib.sha256(repr(geometry).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
