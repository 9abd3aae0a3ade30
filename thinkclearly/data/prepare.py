"""Photo pairs to the tokenized dataset that training reads: VQ codes of both pictures, and labels.

Two steps. Encoding is expensive: it runs in shards of fixed size, shared out over processes, each written once and
found again after an interruption. Labelling is cheap and follows from what encoding stored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value
from tqdm.auto import tqdm

from thinkclearly.data.sources import BadRecord, read_example
from thinkclearly.images import Letterbox, patch_difference
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.backbone import Backbone, codebook_hash, encode_tokens

logger = logging.getLogger(__name__)

SHARD_SIZE = 1024  # pairs per shard; fixed, so that any number of processes gives the same batches
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
    }
)


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
) -> Dataset:
    """Tokenizes and labels photo pairs.

    Args:
        rows: columns of `data.sources.FEATURES`.
        directory: cache; a sub-folder named by the fingerprint of rows, codebook and geometry holds the shards.
        clear_label: where the label is CLEAR. `"tokens"`: source and target have the same code (the original's rule);
            `"pixels"`: no channel of the patch's pixels differs by more than `pixel_tolerance`; `"mask"`: the human
            mask leaves the patch alone.
        pixel_tolerance: of 255.
        on_bad_record: `"error"` stops at the first bad record, `"skip"` leaves it out and lists it.

    Returns:
        Dataset with `key`, `instruction`, `input_tokens` (N codes of the source), `output_tokens` (N classes),
        `target_tokens` (N codes of the target), `pixel_difference` (N, largest of the patch, 0-255), `mask_tokens`
        (N, True where the human mask touches the patch; None without one) and `source` (the picture, encoded).
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record={on_bad_record!r}; choose 'error' or 'skip'")
    info = _describe(backbone)
    folder = Path(directory) / _fingerprint(rows, backbone, info)
    folder.mkdir(parents=True, exist_ok=True)
    state = PartialState()
    count = max(1, -(-len(rows) // SHARD_SIZE))
    mine = [
        (index, range(index * SHARD_SIZE, min(len(rows), (index + 1) * SHARD_SIZE)))
        for index in range(state.process_index, count, state.num_processes)
    ]
    pairs = sum(len(numbers) for _, numbers in mine)
    with tqdm(total=pairs, desc="tokenize", unit="pair", disable=not state.is_main_process) as bar:
        for index, numbers in mine:
            path = _shard_path(folder, index, count)
            _encode_shard(rows.select(numbers), backbone, path, batch_size, on_bad_record, bar)
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
    found, expected = Preparation(**json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))), _describe(backbone)
    for name in ("codebook_hash", "codebook_size", "image_size", "num_image_tokens"):
        if getattr(found, name) != getattr(expected, name):
            raise ValueError(
                f"{folder} was prepared with {name}={getattr(found, name)}, the model has {getattr(expected, name)}. "
                "Prepare the data again with this model."
            )
    # A shard whose records were all skipped has no data file.
    shards = sorted({path.parent for path in folder.glob("shard-*/data-*.arrow") if path.parent.suffix != ".tmp"})
    return datasets.concatenate_datasets([datasets.load_from_disk(str(path)) for path in shards])


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


def _encode_shard(rows: Dataset, backbone: Backbone, path: Path, batch_size: int, on_bad_record: str, bar) -> None:
    """Writes one shard, under its name only when complete; a shard that is there is left alone."""
    if path.is_dir():
        bar.update(len(rows))
        return
    columns, skipped = {name: [] for name in ENCODED}, []
    for batch in rows.iter(batch_size):
        kept, pictures = [], []
        for row in [dict(zip(batch, values)) for values in zip(*batch.values())]:
            try:
                pictures.append(_fit(read_example(row), backbone))
                kept.append(row)
            except BadRecord as error:
                if on_bad_record == "error":
                    raise
                skipped.append(str(error))
        bar.update(len(batch["key"]))
        if not kept:
            continue
        squares = [square for pair in pictures for square in pair[:2]]
        pixels = backbone.processor.pixel_values(squares).to(backbone.model.model.vqmodel.device)
        tokens = encode_tokens(backbone.model, pixels).cpu().view(len(kept), 2, -1).numpy()
        columns["input_tokens"] += list(tokens[:, 0])
        columns["target_tokens"] += list(tokens[:, 1])
        columns["pixel_difference"] += [pair[2] for pair in pictures]
        columns["mask_tokens"] += [pair[3] for pair in pictures]
        for name in ("key", "instruction", "source"):
            columns[name] += [row[name] for row in kept]
    temporary = path.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with _no_bars():
        Dataset.from_dict(columns, features=ENCODED).save_to_disk(str(temporary))  # takes the pictures' bytes along
    (temporary / "skipped.json").write_text(json.dumps(skipped), encoding="utf-8")
    temporary.rename(path)


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


def _fit(example, backbone: Backbone):
    """Square source and target, largest pixel difference of each patch (N,) uint8, and the mask's patches or None."""
    processor = backbone.processor
    box = Letterbox(*example.source.size, processor.image_size)
    source = box.fit(example.source)
    target = Letterbox(*example.target.size, processor.image_size).fit(example.target)
    largest = patch_difference(source, target, processor.grid).ravel()
    mask = None if example.mask is None else box.fit_mask(example.mask, processor.grid).ravel()
    return source, target, largest, mask


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
        [rows._fingerprint, info.codebook_hash, info.image_size, info.num_image_tokens, scale, SHARD_SIZE]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shard_path(folder: Path, index: int, count: int) -> Path:
    return folder / f"shard-{index:05d}-of-{count:05d}"


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is never seen half done."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
