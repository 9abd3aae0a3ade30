"""Pictures of records to codes, in shards on disk: the expensive half of preparation.

Shards have a fixed size, are shared out over processes, and each is written once and found again after an
interruption, while workers read the pictures of the next batches. Knows no labels: a `Layout` says what of a record is
stored and which pictures are encoded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features
from PIL.Image import Image as Picture
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from thinkclearly.data.sources import BadRecord
from thinkclearly.files import new_folder, write_json
from thinkclearly.models.load import Checkpoint

logger = logging.getLogger(__name__)

SHARD_SIZE = 1024  # pairs per shard; fixed, so that any number of processes gives the same batches
CPU_PIXELS = 384**2  # that a CPU encodes at once: more is no faster, and takes memory (0.4 GB for 384 x 384)
GPU_WORKERS = 4  # for one process; a core reads about 25 photographs of a megapixel a second, less if they are PNG
INFO_FILE = "preparation.json"
_SHARD = "shard-?????-of-?????"
DATASET_FILES = (f"{_SHARD}/data-*.arrow", f"{_SHARD}/dataset_info.json", f"{_SHARD}/state.json")


@dataclass
class Preparation:
    """What the tokens were made with; stored as `preparation.json` beside the shards.

    Args:
        codebook_hash (`str`): names the codebook; training refuses tokens of another one.
        codebook_size (`int`): K.
        image_size (`int`), num_image_tokens (`int`): side of the model's square, pixels, and N.
        dtype (`str`): of the encoder.
        records (`int`): pairs that were prepared.
        skipped (`list[str]`): records left out, each with its reason.
        transforms (`dict[str, str]`): `InstructionVocabulary.transforms_seen` of the instructions that were encoded.
    """

    codebook_hash: str
    codebook_size: int
    image_size: int
    num_image_tokens: int
    dtype: str = "float32"
    records: int = 0
    skipped: list[str] | None = None
    transforms: dict[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """What encoding needs of a row.

    Args:
        row: columns that are stored as they are.
        squares: pictures in the model's square.
        codes: column → the squares whose codes it holds, one after the other.
    """

    row: dict
    squares: list[Picture]
    codes: dict[str, list[int]]


@dataclass(frozen=True)
class Layout:
    """One kind of record.

    Args:
        features: all columns that are stored.
        read: (row, size of the square, grid) → `Record`; raises `BadRecord`. It runs in workers and knows no model.
        transforms: of the instructions that are encoded beside the source; see `Preparation`.
        also: names what else `read` depends on, such as a tokenizer.
    """

    features: Features
    read: Callable[[Mapping, int, int], Record]
    transforms: dict[str, str] = field(default_factory=dict)
    also: str = ""


def encode_dataset(
    rows: Dataset,
    checkpoint: Checkpoint,
    directory: str | Path,
    layout: Layout,
    *,
    batch_size: int = 16,
    on_bad_record: str = "error",
    workers: int | None = None,
) -> Dataset:
    """Encodes what is not encoded yet; every process its share.

    Args:
        directory: cache; a sub-folder named by the fingerprint of rows, layout, codebook and geometry holds the
            shards.
        batch_size: records that are read and encoded at once; a CPU encodes large pictures in smaller portions. A
            picture that comes again within a shard is encoded once.
        on_bad_record: `"error"` stops at the first bad record, `"skip"` leaves it out and lists it.
        workers: processes that decode, square and compare pictures while the encoder runs; 0 does it in between. If
            not given, none beside an encoder on the CPU, whose cores are busy, and `GPU_WORKERS` otherwise. The
            result is the same for any number.

    Returns:
        Dataset with the columns of the layout.
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record={on_bad_record!r}; choose 'error' or 'skip'")
    if workers is None:
        on_cpu = tokenizer_device(checkpoint).type == "cpu"
        # Started in another way than by forking, a worker runs the caller's script again.
        workers = GPU_WORKERS if not on_cpu and multiprocessing.get_start_method() == "fork" else 0
    info = _describe(checkpoint, layout.transforms)
    folder = Path(directory) / _fingerprint(rows, checkpoint, info, layout)
    folder.mkdir(parents=True, exist_ok=True)
    state = PartialState()
    count = max(1, -(-len(rows) // SHARD_SIZE))
    shards = {
        _shard_path(folder, index, count): range(index * SHARD_SIZE, min(len(rows), (index + 1) * SHARD_SIZE))
        for index in range(state.process_index, count, state.num_processes)
    }
    missing = {path: numbers for path, numbers in shards.items() if not path.is_dir()}
    # Batches end where shards do, and one loader serves all shards: workers start once, and read on during a write.
    batches = {path: [n[i : i + batch_size] for i in range(0, len(n), batch_size)] for path, n in missing.items()}
    order = [batch for shard in batches.values() for batch in shard]
    loader = DataLoader(
        rows,
        batch_sampler=order,
        collate_fn=partial(_read_batch, read=layout.read, size=info.image_size, grid=checkpoint.processor.grid),
        worker_init_fn=_end_with_parent,
        num_workers=min(workers, max(0, len(order) - 1)),  # a batch alone has nothing to run beside
        generator=torch.Generator(),  # or else it draws from the global one, which training reads
    )
    with tqdm(total=_records(shards), desc="tokenize", unit="record", disable=not state.is_main_process) as bar:
        bar.update(_records(shards) - _records(missing))
        reader = iter(loader)
        for path, parts in batches.items():
            _encode_shard(islice(reader, len(parts)), checkpoint, path, layout.features, on_bad_record, bar)
    state.wait_for_everyone()
    skipped = []
    for index in range(count):
        skipped += json.loads((_shard_path(folder, index, count) / "skipped.json").read_text(encoding="utf-8"))
    info.skipped, info.records = skipped, len(rows) - len(skipped)
    if state.is_main_process:
        write_json(folder / INFO_FILE, asdict(info))
        if skipped:
            logger.warning("%d of %d records were skipped; %s lists them", len(skipped), len(rows), folder / INFO_FILE)
    state.wait_for_everyone()
    if info.records == 0:
        raise BadRecord(f"{folder}: no usable record is left of {len(rows)}; {INFO_FILE} lists why each was skipped")
    if skipped and on_bad_record == "error":  # an earlier run left them out
        raise BadRecord(f"{skipped[0]} ({len(skipped)} bad records in all; {folder / INFO_FILE} lists them)")
    return load_encoded(folder, checkpoint, layout.transforms)


def load_encoded(folder: str | Path, checkpoint: Checkpoint, transforms: Mapping[str, str] = {}) -> Dataset:  # noqa: B006
    """Reads the shards of one preparation; tokens of another codebook, geometry or transforms are refused.

    Args:
        transforms: `transforms_seen` of the vocabulary that the data is for.
    """
    folder = Path(folder)
    if not (folder / INFO_FILE).is_file():
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{INFO_FILE}"))
        meant = " or ".join(inside) or "the folder that has one"
        raise FileNotFoundError(f"{folder} has no {INFO_FILE}; give {meant}.")
    found = Preparation(**json.loads((folder / INFO_FILE).read_text(encoding="utf-8")))
    expected = _describe(checkpoint, transforms)
    for name in ("codebook_hash", "codebook_size", "image_size", "num_image_tokens"):
        if getattr(found, name) != getattr(expected, name):
            raise ValueError(
                f"{folder} was prepared with {name}={getattr(found, name)}, the model has {getattr(expected, name)}. "
                "Prepare the data again with this model."
            )
    if list(found.transforms.items()) != list(expected.transforms.items()):
        raise ValueError(
            f"{folder} was prepared for {_named(found.transforms)}, but {_named(expected.transforms)} is asked for, "
            "in this order and with the transforms registered now. Prepare the data again, or change `instructions`."
        )
    # A shard whose records were all skipped has no data file.
    shards = sorted({path.parent for path in folder.glob("shard-*/data-*.arrow")})
    encoded = datasets.concatenate_datasets([datasets.load_from_disk(str(path)) for path in shards])
    if len(encoded) != found.records:
        raise ValueError(
            f"{folder} holds {len(encoded)} records, {INFO_FILE} says {found.records}: shards of another preparation "
            "lie among them. Remove the folder and prepare again, or push again what was pushed."
        )
    return encoded


def picture_fingerprint(picture: Picture) -> str:
    """Names a picture by its size and pixels."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _records(shards: Mapping[Path, range]) -> int:
    return sum(map(len, shards.values()))


def _end_with_parent(worker: int) -> None:
    """Ends a worker once its parent is killed: waiting to hand over pictures, it would not notice."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read_batch(rows: Sequence[Mapping], read: Callable, size: int, grid: int) -> list[Record | str]:
    """Records of the rows; for a row that cannot be used, why."""
    found = []
    for row in rows:
        try:
            found.append(read(row, size, grid))
        except BadRecord as error:
            found.append(str(error))
    return found


def _encode_shard(
    batches: Iterable[list[Record | str]],
    checkpoint: Checkpoint,
    path: Path,
    features: Features,
    on_bad_record: str,
    bar,
) -> None:
    """Writes one shard, under its name only when complete."""
    columns, skipped = {name: [] for name in features}, []
    # In a session of several turns, a turn's target is the next one's source. Kept for one shard, not for all of a
    # process's, so that batches are the same for any number of processes.
    codes: dict[str, np.ndarray] = {}
    for batch in batches:
        if path.is_dir():  # another run was faster
            bar.update(len(batch))
            continue
        records = [item for item in batch if isinstance(item, Record)]
        bad = [item for item in batch if isinstance(item, str)]
        if bad and on_bad_record == "error":
            raise BadRecord(bad[0])
        skipped += bad
        names = [[picture_fingerprint(square) for square in record.squares] for record in records]
        squares = {n: square for own, r in zip(names, records) for n, square in zip(own, r.squares) if n not in codes}
        if squares:
            codes.update(zip(squares, _encode(list(squares.values()), checkpoint)))
        for own, record in zip(names, records):
            for name, value in record.row.items():
                columns[name].append(value)
            for name, chosen in record.codes.items():
                parts = [codes[own[i]] for i in chosen]
                columns[name].append(np.concatenate(parts) if parts else np.zeros(0, np.int64))
        bar.update(len(batch))
    if path.is_dir():
        return
    with new_folder(path) as folder:
        with _no_bars():
            Dataset.from_dict(columns, features=features).save_to_disk(str(folder))  # takes the pictures' bytes along
        write_json(folder / "skipped.json", skipped)


def _encode(squares: list[Picture], checkpoint: Checkpoint) -> np.ndarray:
    pixels = checkpoint.processor.pixel_values(squares).to(tokenizer_device(checkpoint))
    at_once = max(1, CPU_PIXELS // pixels[0, 0].numel()) if pixels.device.type == "cpu" else len(pixels)
    return torch.cat([checkpoint.token_model.encode(part) for part in pixels.split(at_once)]).cpu().numpy()


def tokenizer_device(checkpoint: Checkpoint) -> torch.device:
    """Where pictures are encoded."""
    family = checkpoint.token_model
    return next(family.parts()[family.tokenizer_part].parameters()).device


@contextmanager
def _no_bars():
    """Without the bars of `datasets`, which would run through ours."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _named(transforms: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({digest})" for name, digest in transforms.items()) or "CLEAR alone"


def _describe(checkpoint: Checkpoint, transforms: Mapping[str, str]) -> Preparation:
    return Preparation(
        checkpoint.token_model.codebook_fingerprint(),
        checkpoint.token_model.codebook_size,
        checkpoint.processor.image_size,
        checkpoint.processor.num_image_tokens,
        transforms=dict(transforms),
    )


def _fingerprint(rows: Dataset, checkpoint: Checkpoint, info: Preparation, layout: Layout) -> str:
    scale = [checkpoint.processor.image_mean, checkpoint.processor.image_std]
    geometry = [info.codebook_hash, info.image_size, info.num_image_tokens, scale, SHARD_SIZE]
    text = json.dumps([rows._fingerprint, *geometry, [*layout.features], *layout.transforms.items()])
    text += layout.also
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shard_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"shard-{index:05d}-of-{count:05d}"
