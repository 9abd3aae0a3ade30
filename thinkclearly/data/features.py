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
from thinkclearly.models.backbone import tower_features
from thinkclearly.models.clear_head import ClearEditModel
from thinkclearly.models.prompt import ClearEditProcessor

logger = logging.getLogger(__name__)

BATCH = 16  # pictures that the tower sees at once


def source_square(row: dict, image_size: int) -> Image.Image:
    """The source picture of a row, fitted into the model's square; `BadRecord` where it cannot be read."""
    try:
        picture = load_image(row["source"], f"{row['key']}: source")
    except ImageError as error:
        raise BadRecord(str(error)) from error
    return Letterbox(*picture.size, image_size).fit(picture)


class FeatureCache:
    """Features of source pictures on disk, before the aligner: its output is wider (at 7B 4.7 MB, before it 1.2 MB).

    Args:
        folder: holds `<SHA-256 of the encoded picture>.safetensors`, each a tensor (N, W).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, row: dict) -> Path:
        """Where the features of a row's source picture are or will be."""
        source = row["source"] or {}
        if not (source.get("bytes") or source.get("path")):
            raise BadRecord(f"{row['key']}: no source picture; leave cache_features out, or the record")
        try:
            content = source["bytes"] or Path(source["path"]).read_bytes()
        except OSError as error:
            raise BadRecord(f"{row['key']}: source {source['path']} cannot be read: {error.strerror}") from error
        return self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"

    def read(self, rows: Iterable[dict]) -> torch.Tensor:
        """Features (B, N, W) in the type they were stored in."""
        return torch.stack([self._read(row) for row in rows])

    def _read(self, row: dict) -> torch.Tensor:
        path = self.path(row)
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError) as error:
            raise BadRecord(
                f"{row['key']}: no features of its picture in {path} ({error}). Remove the file if it is there and "
                "start again: what is missing is computed."
            ) from error


@torch.no_grad()
def cache_features(
    parts: list[Dataset], model: ClearEditModel, processor: ClearEditProcessor, directory: str | Path
) -> FeatureCache:
    """Computes what is not there yet; every process its share.

    The tower runs in the type of its own weights, as inference runs it: mixed precision would keep some of its
    operations in float32.

    Args:
        parts: prepared splits with the column `source`.
        directory: gets a sub-folder `features-…` named by the tower's weights and the geometry.

    Raises:
        ValueError: the tower learns, so its features would change, or there are no pictures.
    """
    tower = model.base.model.vision_model
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError("cache_features: the vision tower is trained here; leave cache_features out, or freeze it")
    if any("source" not in part.column_names for part in parts):
        raise ValueError("cache_features: the data has tokens alone and no pictures; leave cache_features out")
    cache = FeatureCache(Path(directory) / f"features-{_fingerprint(tower, processor)}")
    cache.folder.mkdir(parents=True, exist_ok=True)
    state, count = PartialState(), sum(map(len, parts))
    width, dtype = tower.config.hidden_size, next(tower.parameters()).dtype
    gigabytes = count * processor.num_image_tokens * width * dtype.itemsize / 1e9
    if state.is_main_process:
        logger.info("Features of %d pictures go to %s: %.2f GB when complete", count, cache.folder, gigabytes)
    was_training = tower.training
    tower.eval()
    with tqdm(total=count, desc="features", unit="picture", disable=not state.is_main_process) as bar:
        for part in parts:
            pictures = part.select_columns(["key", "source"])
            for start in range(state.process_index * BATCH, len(part), state.num_processes * BATCH):
                rows = pictures.select(range(start, min(start + BATCH, len(part)))).to_list()
                _fill(cache, rows, model, processor)
                bar.update(len(rows) * state.num_processes)
    tower.train(was_training)
    state.wait_for_everyone()
    return cache


def _fill(cache: FeatureCache, rows: list[dict], model: ClearEditModel, processor: ClearEditProcessor) -> None:
    missing = {path: row for row in rows if not (path := cache.path(row)).exists()}
    if not missing:
        return
    squares = [source_square(row, processor.image_size) for row in missing.values()]
    features = tower_features(model.base, processor.pixel_values(squares).to(model.device)).cpu()
    for path, values in zip(missing, features):
        with replacing(path) as temporary:
            save_file({"features": values.clone()}, temporary)


def _fingerprint(tower: torch.nn.Module, processor: ClearEditProcessor) -> str:
    """Names what features follow from besides the picture: the tower's weights, their type, and the geometry."""
    geometry = (processor.image_size, processor.image_mean, processor.image_std)
    digest = hashlib.sha256(repr(geometry).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
