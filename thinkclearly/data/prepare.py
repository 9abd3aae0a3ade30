"""Photo pairs to the tokenized dataset that training reads: VQ codes of both pictures, and labels.

Two steps. Encoding is expensive: it runs in shards of fixed size, shared out over processes, each written once and
found again after an interruption, while workers read the pictures of the next batches. Labelling is cheap and follows
from what encoding stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as Picture
from PIL.Image import Resampling
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from thinkclearly.data.sources import BadRecord, EditExample, read_example
from thinkclearly.files import new_folder, write_json
from thinkclearly.images import Letterbox, patch_difference
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.backbone import Backbone, codebook_hash, encode_tokens

logger = logging.getLogger(__name__)

SHARD_SIZE = 1024  # pairs per shard; fixed, so that any number of processes gives the same batches
CPU_PIXELS = 384**2  # that a CPU encodes at once: more is no faster, and takes memory (0.4 GB for 384 x 384)
GPU_WORKERS = 4  # for one process; a core reads about 25 photographs of a megapixel a second, less if they are PNG
INFO_FILE = "preparation.json"
LABEL_RULES = ("tokens", "pixels", "mask")
ENCODED = Features(
    {
        "key": Value("string"),
        "instruction": Value("string"),
        "input_tokens": List(Value("int32")),
        "target_tokens": List(Value("int32")),
        "pixel_difference": List(Value("uint8")),
        "mask_tokens": List(Value("bool")),
        "source": Image(decode=False),
        "origins": List(Value("string")),
    }
)
MAX_STRETCH = 1.03  # of a target against its source; editors that round sizes to multiples of 16 stay under it


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
    """

    codebook_hash: str
    codebook_size: int
    image_size: int
    num_image_tokens: int
    dtype: str = "float32"
    records: int = 0
    skipped: list[str] | None = None


def prepare_dataset(
    rows: Dataset,
    backbone: Backbone,
    directory: str | Path,
    *,
    clear_label: str = "pixels",
    pixel_tolerance: int = 16,
    batch_size: int = 16,
    on_bad_record: str = "error",
    workers: int | None = None,
) -> Dataset:
    """Tokenizes and labels photo pairs.

    Args:
        rows: columns of `data.sources.FEATURES`.
        directory: cache; a sub-folder named by the fingerprint of rows, codebook and geometry holds the shards.
        clear_label: where the label is CLEAR. `"tokens"`: source and target have the same code (the original's rule);
            `"pixels"`: no channel of the patch's pixels differs by more than `pixel_tolerance`; `"mask"`: the human
            mask leaves the patch alone.
        pixel_tolerance: of 255.
        batch_size: pairs that are read and encoded at once; a CPU encodes large pictures in smaller portions. A
            picture that comes again within a shard is encoded once.
        on_bad_record: `"error"` stops at the first bad record, `"skip"` leaves it out and lists it.
        workers: processes that decode, square and compare pictures while the encoder runs; 0 does it in between. If
            not given, none beside an encoder on the CPU, whose cores are busy, and `GPU_WORKERS` otherwise. The
            result is the same for any number.

    Returns:
        Dataset with `key`, `instruction`, `input_tokens` (N codes of the source), `output_tokens` (N classes),
        `target_tokens` (N codes of the target), `pixel_difference` (N, largest of the patch, 0-255), `mask_tokens`
        (N, True where the human mask touches the patch; None without one), `source` (the picture, encoded) and
        `origins` (fingerprints of both pictures, and the session: records that share one are never split).
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record={on_bad_record!r}; choose 'error' or 'skip'")
    if workers is None:
        on_cpu = backbone.model.model.vqmodel.device.type == "cpu"
        # Started in another way than by forking, a worker runs the caller's script again.
        workers = GPU_WORKERS if not on_cpu and multiprocessing.get_start_method() == "fork" else 0
    info = _describe(backbone)
    folder = Path(directory) / _fingerprint(rows, backbone, info)
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
        collate_fn=partial(_read_batch, size=info.image_size, grid=backbone.processor.grid),
        worker_init_fn=_end_with_parent,
        num_workers=min(workers, max(0, len(order) - 1)),  # a batch alone has nothing to run beside
        generator=torch.Generator(),  # or else it draws from the global one, which training reads
    )
    with tqdm(total=_pairs(shards), desc="tokenize", unit="pair", disable=not state.is_main_process) as bar:
        bar.update(_pairs(shards) - _pairs(missing))
        reader = iter(loader)
        for path, parts in batches.items():
            _encode_shard(islice(reader, len(parts)), backbone, path, on_bad_record, bar)
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
    encoded = load_encoded(folder, backbone)
    with state.main_process_first():
        return label_dataset(encoded, clear_label, pixel_tolerance, InstructionVocabulary(info.codebook_size))


def load_encoded(folder: str | Path, backbone: Backbone) -> Dataset:
    """Reads the shards of one preparation; tokens of another codebook or geometry are refused."""
    folder = Path(folder)
    if not (folder / INFO_FILE).is_file():
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{INFO_FILE}"))
        meant = " or ".join(inside) or "the folder that has one"
        raise FileNotFoundError(f"{folder} has no {INFO_FILE}; give {meant}.")
    found, expected = Preparation(**json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))), _describe(backbone)
    for name in ("codebook_hash", "codebook_size", "image_size", "num_image_tokens"):
        if getattr(found, name) != getattr(expected, name):
            raise ValueError(
                f"{folder} was prepared with {name}={getattr(found, name)}, the model has {getattr(expected, name)}. "
                "Prepare the data again with this model."
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


def label_dataset(encoded: Dataset, rule: str, tolerance: int, vocabulary: InstructionVocabulary) -> Dataset:
    """Adds `output_tokens` by the rule; see `prepare_dataset`."""
    if rule not in LABEL_RULES:
        raise ValueError(f"clear_label={rule!r}; choose from {', '.join(LABEL_RULES)}")

    def label(batch: dict) -> dict:
        holds = torch.from_numpy(unchanged(batch, rule, tolerance)).unsqueeze(-2)
        return {"output_tokens": vocabulary.label(torch.from_numpy(batch["target_tokens"]), holds).numpy()}

    # Only what the rules read goes through the map: the pictures need not be copied.
    needed = encoded.select_columns(["key", "input_tokens", "target_tokens", "pixel_difference", "mask_tokens"])
    labels = needed.with_format("numpy").map(
        label,
        batched=True,
        remove_columns=needed.column_names,
        features=Features({"output_tokens": List(Value("int32"))}),
        desc=f"label by {rule}",
    )
    return datasets.concatenate_datasets([encoded, labels.with_format(None)], axis=1)


def unchanged(batch: dict, rule: str, tolerance: int) -> np.ndarray:
    """Where the target is the source, bool (B, N), by a rule of `LABEL_RULES`."""
    if rule == "tokens":
        return np.asarray(batch["input_tokens"]) == np.asarray(batch["target_tokens"])
    if rule == "pixels":
        return np.asarray(batch["pixel_difference"]) <= tolerance
    for key, mask in zip(batch["key"], batch["mask_tokens"]):
        if mask is None:
            raise BadRecord(
                f"{key} has no mask, and clear_label=mask needs one for every record; use pixels or tokens"
            )
    return ~np.stack(batch["mask_tokens"]).astype(bool)


def _pairs(shards: Mapping[Path, range]) -> int:
    return sum(map(len, shards.values()))


def _end_with_parent(worker: int) -> None:
    """Ends a worker once its parent is killed: waiting to hand over pictures, it would not notice."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class _Pair:
    """What encoding needs of a row, and what is stored with the codes."""

    row: dict  # key, instruction, source, origins
    squares: tuple[Picture, Picture]
    digests: list[str]  # of the squares' pixels
    pixel_difference: np.ndarray  # (N,) uint8, largest of each patch
    mask_tokens: np.ndarray | None  # (N,) bool


def _read_batch(rows: Sequence[Mapping], size: int, grid: int) -> list[_Pair | str]:
    """Pairs of the rows; for a row that cannot be used, why. Runs in workers, so it knows no model."""
    return [_read_pair(row, size, grid) for row in rows]


def _read_pair(row: Mapping, size: int, grid: int) -> _Pair | str:
    try:
        return _pair(row, size, grid)
    except BadRecord as error:
        return str(error)


def _pair(row: Mapping, size: int, grid: int) -> _Pair:
    example = read_example(row)
    box = Letterbox(*example.source.size, size)
    squares = box.fit(example.source), _aligned(example, box)
    origins = [_fingerprint_of(picture) for picture in (example.source, example.target)]
    if row.get("session") is not None:
        origins.append(f"session {row['session']}")
    return _Pair(
        {"key": row["key"], "instruction": row["instruction"], "source": row["source"], "origins": origins},
        squares,
        [_fingerprint_of(square) for square in squares],
        patch_difference(*squares, grid).ravel(),
        None if example.mask is None else box.fit_mask(example.mask, grid).ravel(),
    )


def _fingerprint_of(picture: Picture) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


def _aligned(example: EditExample, box: Letterbox) -> Picture:
    """The target in its source's square, patch over patch. Raises `BadRecord` where its shape is another one."""
    source, target = example.source, example.target
    stretch = (target.width * source.height) / (target.height * source.width)
    if not 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:
        raise BadRecord(
            f"{example.key}: the source is {source.width}x{source.height}, the target {target.width}x{target.height}: "
            "of another shape, so their patches do not show the same. Crop one of them."
        )
    own = Letterbox(*target.size, box.size)
    if (own.inner_width, own.inner_height) == (box.inner_width, box.inner_height):
        return own.fit(target)
    return box.fit(target.resize(source.size, Resampling.BICUBIC))


def _encode_shard(
    batches: Iterable[list[_Pair | str]], backbone: Backbone, path: Path, on_bad_record: str, bar
) -> None:
    """Writes one shard, under its name only when complete."""
    columns, skipped = {name: [] for name in ENCODED}, []
    # In a session of several turns, a turn's target is the next one's source. Kept for one shard, not for all of a
    # process's, so that batches are the same for any number of processes.
    codes: dict[str, np.ndarray] = {}
    for batch in batches:
        if path.is_dir():  # another run was faster
            bar.update(len(batch))
            continue
        pairs = [item for item in batch if isinstance(item, _Pair)]
        bad = [item for item in batch if isinstance(item, str)]
        if bad and on_bad_record == "error":
            raise BadRecord(bad[0])
        skipped += bad
        new = {name: square for pair in pairs for name, square in zip(pair.digests, pair.squares) if name not in codes}
        if new:
            pixels = backbone.processor.pixel_values(list(new.values())).to(backbone.model.model.vqmodel.device)
            at_once = max(1, CPU_PIXELS // pixels[0, 0].numel()) if pixels.device.type == "cpu" else len(pixels)
            tokens = torch.cat([encode_tokens(backbone.model, part) for part in pixels.split(at_once)])
            codes.update(zip(new, tokens.cpu().numpy()))
        for pair in pairs:
            for name, value in pair.row.items():
                columns[name].append(value)
            for name, digest in zip(("input_tokens", "target_tokens"), pair.digests):
                columns[name].append(codes[digest])
            columns["pixel_difference"].append(pair.pixel_difference)
            columns["mask_tokens"].append(pair.mask_tokens)
        bar.update(len(batch))
    if path.is_dir():
        return
    with new_folder(path) as folder:
        with _no_bars():
            Dataset.from_dict(columns, features=ENCODED).save_to_disk(str(folder))  # takes the pictures' bytes along
        write_json(folder / "skipped.json", skipped)


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


def _describe(backbone: Backbone) -> Preparation:
    return Preparation(
        codebook_hash(backbone.model),
        backbone.model.config.vq_config.num_embeddings,
        backbone.processor.image_size,
        backbone.processor.num_image_tokens,
    )


def _fingerprint(rows: Dataset, backbone: Backbone, info: Preparation) -> str:
    scale = [backbone.processor.image_mean, backbone.processor.image_std]
    text = json.dumps(
        [rows._fingerprint, info.codebook_hash, info.image_size, info.num_image_tokens, scale, SHARD_SIZE, [*ENCODED]]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shard_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"shard-{index:05d}-of-{count:05d}"
