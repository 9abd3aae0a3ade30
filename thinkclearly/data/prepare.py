"""Records to the tokenized dataset that training reads: codes of the pictures, and labels.

Photo pairs are labelled: an instruction where the target is its transform of the source, else the target's code.
Samples of supervised training keep the target's codes. Encoding is `data.encode`'s; labelling is cheap and follows
from what it stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as Picture
from PIL.Image import Resampling

from thinkclearly.data.encode import Layout, Record, encode_dataset, picture_fingerprint
from thinkclearly.data.samples import read_sample
from thinkclearly.data.sources import BadRecord, EditExample, read_example
from thinkclearly.images import Letterbox, patch_difference
from thinkclearly.instructions import CLEAR, InstructionVocabulary
from thinkclearly.models.load import Checkpoint

logger = logging.getLogger(__name__)

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
# With further instructions than CLEAR: of each, one after the other, what CLEAR has in the columns above.
TRANSFORMED = {"transformed_tokens": List(Value("int32")), "transformed_difference": List(Value("uint8"))}
SAMPLES = Features(
    {
        "key": Value("string"),
        "instruction": Value("string"),
        "input_tokens": List(Value("int32")),
        "target_tokens": List(Value("int32")),
        "answer": Value("string"),
        "sources": List(Image(decode=False)),
        "content": List(Value("bool")),
        "pixel_difference": List(Value("uint8")),
        "origins": List(Value("string")),
    }
)


def prepare_dataset(
    rows: Dataset,
    checkpoint: Checkpoint,
    directory: str | Path,
    *,
    instructions: Sequence[str] = (CLEAR,),
    clear_label: str = "pixels",
    pixel_tolerance: int = 16,
    **options,
) -> Dataset:
    """Tokenizes and labels photo pairs.

    Args:
        rows: columns of `data.sources.FEATURES`.
        directory: cache, see `data.encode.encode_dataset`.
        instructions: names of instruction tokens, in the order of their ids; the first that holds is the label.
        clear_label: where an instruction is the label. `"tokens"`: the target has the code of its transform of the
            source (for CLEAR the original's rule); `"pixels"`: no channel of the patch's pixels differs by more than
            `pixel_tolerance`; `"mask"`: CLEAR where the human mask leaves the patch alone, others by pixels.
        pixel_tolerance: of 255.
        options: `batch_size`, `on_bad_record` and `workers` of `encode_dataset`.

    Returns:
        Dataset with `key`, `instruction`, `input_tokens` (N codes of the source), `output_tokens` (N classes),
        `target_tokens` (N codes of the target), `pixel_difference` (N, largest of the patch, 0-255), `mask_tokens`
        (N, True where the human mask touches the patch; None without one), `source` (the picture, encoded) and
        `origins` (fingerprints of both pictures, and the session: records that share one are never split). With other
        instructions than CLEAR also `transformed_tokens` (I·N codes) and `transformed_difference` (I·N).
    """
    vocabulary = InstructionVocabulary(checkpoint.token_model.codebook_size, tuple(instructions))
    transforms = vocabulary.transforms_seen()
    features = Features({**ENCODED, **(TRANSFORMED if transforms else {})})
    layout = Layout(features, partial(_read_pair, names=tuple(transforms)), transforms)
    encoded = encode_dataset(rows, checkpoint, directory, layout, **options)
    with PartialState().main_process_first():
        return label_dataset(encoded, clear_label, pixel_tolerance, vocabulary)


def prepare_samples(rows: Dataset, checkpoint: Checkpoint, directory: str | Path, **options) -> Dataset:
    """Tokenizes the records of supervised training.

    Args:
        rows: columns of `data.samples.SAMPLES`.
        directory, options: see `prepare_dataset`.

    Returns:
        Dataset with `key`, `instruction`, `input_tokens` (N codes of each picture that is shown), `output_tokens` (N
        codes of the target, none where words are answered), `answer` (or None), `sources` (the pictures, encoded),
        `content` (N, True where the patch shows the target and not the bars beside it), `pixel_difference` (N,
        between target and source where there is one source of the target's size) and `origins`.
    """
    encoded = encode_dataset(rows, checkpoint, directory, Layout(SAMPLES, _read_sample), **options)
    return encoded.rename_column("target_tokens", "output_tokens")


def with_source_codes(records: Dataset, tolerance: int) -> Dataset:
    """`output_tokens` with the source's code where no pixel of a patch differs from it by more than `tolerance`.

    The tokenizer looks beyond its patch: what an edit leaves alone comes back as other codes, which say nothing. Other
    records than edits of one picture stay as they are.
    """

    def choose(row: dict) -> dict:
        difference, codes = np.asarray(row["pixel_difference"]), np.asarray(row["output_tokens"])
        if len(difference):
            codes = np.where(difference <= tolerance, row["input_tokens"], codes)
        return {"output_tokens": codes.astype(np.int32)}

    read = records.select_columns(["pixel_difference", "input_tokens", "output_tokens"])
    chosen = read.map(
        choose,
        remove_columns=["pixel_difference", "input_tokens"],
        features=Features({"output_tokens": List(Value("int32"))}),
        desc="codes of the source",
    )
    return datasets.concatenate_datasets([records.remove_columns("output_tokens"), chosen], axis=1)


def label_dataset(encoded: Dataset, rule: str, tolerance: int, vocabulary: InstructionVocabulary) -> Dataset:
    """Adds `output_tokens` by the rule; see `prepare_dataset`."""
    if rule not in LABEL_RULES:
        raise ValueError(f"clear_label={rule!r}; choose from {', '.join(LABEL_RULES)}")

    def label(batch: dict) -> dict:
        holds = torch.from_numpy(instructed(batch, rule, tolerance, vocabulary.names))
        return {"output_tokens": vocabulary.label(torch.from_numpy(batch["target_tokens"]), holds).numpy()}

    # Only what the rules read goes through the map: the pictures need not be copied.
    columns = ["key", "input_tokens", "target_tokens", "pixel_difference", "mask_tokens", *TRANSFORMED]
    needed = encoded.select_columns([name for name in columns if name in encoded.column_names])
    labels = needed.with_format("numpy").map(
        label,
        batched=True,
        remove_columns=needed.column_names,
        features=Features({"output_tokens": List(Value("int32"))}),
        desc=f"label by {rule}",
    )
    return datasets.concatenate_datasets([encoded, labels.with_format(None)], axis=1)


def instructed(batch: dict, rule: str, tolerance: int, names: Sequence[str]) -> np.ndarray:
    """Where the target is each instruction's transform of the source, bool (B, I, N), by a rule of `LABEL_RULES`."""
    count = len(batch["key"])
    holds = []
    for i, name in enumerate(names):
        if name == CLEAR:
            holds.append(unchanged(batch, rule, tolerance))
            continue
        codes, difference = (np.asarray(batch[column]).reshape(count, len(names), -1)[:, i] for column in TRANSFORMED)
        holds.append(codes == np.asarray(batch["target_tokens"]) if rule == "tokens" else difference <= tolerance)
    return np.stack(holds, axis=1)


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


def _read_pair(row: Mapping, size: int, grid: int, names: Sequence[str] = ()) -> Record:
    """A photo pair; `names` are the instructions whose transforms are encoded, too."""
    example = read_example(row)
    box = Letterbox(*example.source.size, size)
    source, target = box.fit(example.source), _aligned(example, box)
    origins = [picture_fingerprint(picture) for picture in (example.source, example.target)]
    if row.get("session") is not None:
        origins.append(f"session {row['session']}")
    columns = {
        "key": row["key"],
        "instruction": example.instruction,
        "source": row["source"],
        "origins": origins,
        "pixel_difference": patch_difference(source, target, grid).ravel(),
        "mask_tokens": None if example.mask is None else box.fit_mask(example.mask, grid).ravel(),
    }
    squares, codes = [source, target], {"input_tokens": [0], "target_tokens": [1]}
    if names:
        squares += map(box.fit, InstructionVocabulary(0, tuple(names)).transforms(example.source))
        differences = [patch_difference(square, target, grid).ravel() for square in squares[2:]]
        columns["transformed_difference"] = np.concatenate(differences)
        codes["transformed_tokens"] = list(range(2, len(squares)))
    return Record(columns, squares, codes)


def _read_sample(row: Mapping, size: int, grid: int) -> Record:
    sample = read_sample(row)
    pictures = [*sample.sources, *([] if sample.target is None else [sample.target])]
    content = np.zeros(0, bool)
    if sample.target is not None:
        content = Letterbox(*sample.target.size, size).content(grid).ravel()
    # Records without any picture share none: the words tell which they are.
    origins = [picture_fingerprint(picture) for picture in pictures] or [f"words {sample.instruction}"]
    columns = {
        "key": row["key"],
        "instruction": sample.instruction,
        "answer": sample.answer,
        "sources": row["sources"],
        "content": content,
        "origins": origins,
    }
    squares = [Letterbox(*picture.size, size).fit(picture) for picture in pictures]
    shown = len(sample.sources)
    comparable = shown == 1 and len(squares) == 2 and len({picture.size for picture in pictures}) == 1
    columns["pixel_difference"] = patch_difference(*squares, grid).ravel() if comparable else np.zeros(0, np.uint8)
    return Record(
        columns, squares, {"input_tokens": list(range(shown)), "target_tokens": [*range(shown, len(squares))]}
    )


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
