"""The data that a job's options name, tokenized, in three parts that share no picture: train, calibration, test.

Knows every source. Does not know what the records are for.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from huggingface_hub import snapshot_download

from thinkclearly.data import sources
from thinkclearly.data.encode import DATASET_FILES, INFO_FILE, load_encoded
from thinkclearly.data.groups import group_records, hold_out, token_origins
from thinkclearly.data.jsonl import read_jsonl
from thinkclearly.data.magicbrush import magicbrush
from thinkclearly.data.options import DataArguments
from thinkclearly.data.pairs import pair_samples, read_pairs, shape_pairs
from thinkclearly.data.prepare import label_dataset, prepare_dataset, prepare_samples
from thinkclearly.data.samples import captioned_pictures, sharegpt4o_samples
from thinkclearly.data.shapes import random_edit
from thinkclearly.data.sources import PARTS
from thinkclearly.instructions import CLEAR, InstructionVocabulary
from thinkclearly.models.load import Checkpoint

logger = logging.getLogger(__name__)

SHAPES = 2000  # built-in edits to train on where no limit is given
SHAPE_PAIRS = 600  # pairs of captions, likewise


@dataclass
class PreparedData:
    """Tokenized parts, None for what there is not. No picture and no session is in two of them.

    Args:
        calibration: fits the gate.
        test: what is reported.
        left_out: thoughts that were too long.
        rows: by the name of a part the photo pairs that it came from, record for record, where there are pictures.
    """

    train: Dataset | None = None
    calibration: Dataset | None = None
    test: Dataset | None = None
    rows: dict[str, Dataset] = field(default_factory=dict)
    left_out: int = 0


def build_data(
    data: DataArguments,
    checkpoint: Checkpoint,
    parts: Sequence[str] = PARTS,
    instructions: Sequence[str] = (CLEAR,),
) -> PreparedData:
    """Reads, tokenizes, labels and splits photo pairs; what was prepared before is found again.

    Args:
        instructions: instruction tokens that are labels.
        parts: those that are wanted; of the built-in shapes no others are made.

    Raises:
        ValueError: too few records, or too few that share no picture, to hold any out.
    """
    if data.source not in ("jsonl", "prepared", "shapes", "magicbrush", "folder", "sharegpt4o"):
        use = f"use it with --method {'interleaved' if data.source == 'thoughts' else 'sft'}"
        raise ValueError(f"source: {data.source} has no photo pairs; {use}")
    state = PartialState()
    options = {
        "instructions": instructions,
        "clear_label": data.clear_label,
        "pixel_tolerance": data.pixel_tolerance,
        **encoding(data),
    }
    prepare = partial(prepare_dataset, checkpoint=checkpoint, directory=data.prepared_dir, **options)
    if data.source in ("jsonl", "prepared"):
        with state.main_process_first():
            return split_records(_read_tokens(data, checkpoint, instructions), None, data, parts)
    tokenizer_to_device(checkpoint)
    if data.source == "shapes":
        return _build_shapes(data, prepare, parts)
    with state.main_process_first():
        rows = read_rows(data)
    return split_records(prepare(rows), rows, data, parts)


def build_samples(data: DataArguments, checkpoint: Checkpoint) -> PreparedData:
    """Reads, tokenizes and splits the records of supervised training: pictures from words, edits, answers.

    Of pairs (`build_prompts`), each picture is drawn from its prompt, and `eval_samples` and `limit` count pairs.
    """
    if data.source not in ("sharegpt4o", "captions", "pairs", "shapes"):
        known = "sharegpt4o, captions, pairs or shapes"
        raise ValueError(f"source: {data.source} has photo pairs alone; --method sft reads {known}")
    tokenizer_to_device(checkpoint)
    if data.source in ("pairs", "shapes"):
        return _samples_of_pairs(data, checkpoint)
    with PartialState().main_process_first():
        read = sharegpt4o_samples if data.source == "sharegpt4o" else captioned_pictures
        rows = select_rows(read(data.path), data)
    records = prepare_samples(rows, checkpoint, data.prepared_dir, **encoding(data))
    with PartialState().main_process_first():
        return split_records(records, None, replace(data, calibration_edits=0), ("train", "test"))


def _samples_of_pairs(data: DataArguments, checkpoint: Checkpoint) -> PreparedData:
    found, samples = build_prompts(data), PreparedData()
    for part in [part for part in ("train", "test") if getattr(found, part) is not None]:
        with PartialState().main_process_first():
            rows = pair_samples(getattr(found, part))
        setattr(samples, part, prepare_samples(rows, checkpoint, data.prepared_dir, **encoding(data)))
    return samples


def build_prompts(data: DataArguments, prompts_path: str | None = None) -> PreparedData:
    """Reads and splits what is to be drawn and rewarded: `data.pairs.PROMPTS`, parts train and test.

    No prompt and no picture is in both parts; pictures of files are told apart by their paths.

    Args:
        prompts_path: a text file of single prompts that are mixed in.

    Raises:
        ValueError: a source without pairs, an option that the built-in shapes have no use for, or too few records.
    """
    if data.source not in ("pairs", "shapes"):
        raise ValueError(f"source: {data.source} has no prompts to draw and reward; expected pairs or shapes")
    with PartialState().main_process_first():
        if data.source == "shapes":
            return _build_shape_pairs(data, prompts_path)
        rows = read_pairs(data.path, data.on_bad_record, data.split)
        if prompts_path:
            rows = concatenate_datasets([rows, read_pairs(prompts_path, data.on_bad_record)])
        rows = select_rows(rows, data)
        return split_records(rows, None, data, ("train", "test"), _origins_of_pairs(rows))


def build_rewarded_edits(data: DataArguments) -> PreparedData:
    """Reads and splits photo pairs whose edits are drawn and rewarded: `data.sources.FEATURES`, parts train and test.

    The built-in shapes have a further column `edit`, the whole edit as JSON, for rewards that know what was asked.

    Raises:
        ValueError: a source without pictures, or too few records.
    """
    if data.source in ("jsonl", "prepared", "captions", "pairs"):
        raise ValueError(f"source: {data.source} has no pictures to edit and reward; expected shapes or photo pairs")
    with PartialState().main_process_first():
        if data.source == "shapes":
            counts = {"train": data.limit or SHAPES, "test": data.eval_samples}
            return PreparedData(
                **{part: _rewarded_shapes(data, count, part) for part, count in counts.items() if count}
            )
        rows = read_rows(data)
        origins = [
            [_picture_name(row["source"]), *([f"session {row['session']}"] if row["session"] else [])] for row in rows
        ]
        return split_records(rows, None, replace(data, calibration_edits=0), ("train", "test"), origins)


def _rewarded_shapes(data: DataArguments, count: int, part: str) -> Dataset:
    options = {"size": data.shapes_size, "seed": data.split_seed, "photos_folder": data.photos_folder}
    rows, photos = sources.shapes(count, split=part, **options), sources.photos_of(part, data.photos_folder)
    edits = [random_edit(*map(int, key[7:-1].split(":")), photos).to_json() for key in rows["key"]]
    return rows.add_column("edit", edits)


def _build_shape_pairs(data: DataArguments, prompts_path: str | None) -> PreparedData:
    if data.photos_folder or prompts_path:
        raise ValueError(
            "source: shapes draws pairs on plain backgrounds that captions name, and rewards what it knows the scene "
            "of: photos_folder and prompts_path mean nothing here. For your own prompts use source: pairs"
        )
    options = {"seed": data.split_seed, "size": data.shapes_size, "shapes": data.pair_shapes}
    train = shape_pairs(data.limit or SHAPE_PAIRS, "train", **options)
    return PreparedData(train, test=shape_pairs(data.eval_samples, "test", **options) if data.eval_samples else None)


def _origins_of_pairs(rows: Dataset) -> list[list[str]]:
    """What each record must not be split from: its prompts and its pictures."""
    return [[*prompts, *map(_picture_name, images)] for prompts, images in zip(rows["prompts"], rows["images"])]


def _picture_name(picture: dict) -> str:
    content = picture["bytes"]
    return os.path.realpath(picture["path"]) if content is None else hashlib.sha256(content).hexdigest()


def encoding(data: DataArguments) -> dict:
    """Options of `encode_dataset`."""
    return {
        "batch_size": data.prepare_batch_size,
        "on_bad_record": data.on_bad_record,
        "workers": data.prepare_workers,
    }


def tokenizer_to_device(checkpoint: Checkpoint) -> None:
    """The image tokenizer to this process's device."""
    family = checkpoint.token_model
    family.parts()[family.tokenizer_part].to(PartialState().device)


def _build_shapes(data: DataArguments, prepare: Callable[[Dataset], Dataset], parts: Sequence[str]) -> PreparedData:
    """The generator draws any number of edits for every part, so nothing needs to be held out."""
    counts = {"train": data.limit or SHAPES, "calibration": data.calibration_edits, "test": data.eval_samples}
    options = {"size": data.shapes_size, "seed": data.split_seed, "photos_folder": data.photos_folder}
    found = PreparedData()
    for part in [part for part in parts if counts[part]]:
        with PartialState().main_process_first():
            rows = sources.shapes(counts[part], split=part, **options)
        setattr(found, part, prepare(rows))
        found.rows[part] = rows
    return found


def read_rows(data: DataArguments) -> Dataset:
    """The photo pairs of a source that has them as files or as a table: `data.sources.FEATURES`."""
    if data.source != "magicbrush":
        read = sources.folder if data.source == "folder" else sources.sharegpt4o
        return select_rows(read(data.path), data)
    rows = magicbrush(
        data.path or "osunlp/MagicBrush",
        split=data.split,
        include=data.include,
        exclude=data.exclude,
        match=data.match,
        turn_index=data.turn_index,
        shuffle_seed=data.split_seed if data.shuffle else None,
        limit=data.limit,
        streaming=data.streaming,
    )
    return Dataset.from_list(list(rows), features=sources.FEATURES) if data.streaming else rows


def _read_tokens(data: DataArguments, checkpoint: Checkpoint, instructions: Sequence[str]) -> Dataset:
    """Labelled records of a source that has tokens already."""
    codes = checkpoint.token_model.codebook_size
    vocabulary = InstructionVocabulary(codes, tuple(instructions))
    if data.source == "jsonl":
        n = checkpoint.processor.num_image_tokens
        rows, _ = read_jsonl(data.path, codes, n, on_bad_record=data.on_bad_record, names=instructions)
        rows = rows.add_column("key", [f"{Path(data.path).name}[{i}]" for i in range(len(rows))])
        return select_rows(rows, data)
    encoded = select_rows(load_encoded(pull_dataset(data.path), checkpoint, vocabulary.transforms_seen()), data)
    if "origins" not in encoded.column_names:  # prepared by an earlier version
        encoded = encoded.add_column(
            "origins", list(map(token_origins, encoded["input_tokens"], encoded["target_tokens"]))
        )
    return label_dataset(encoded, data.clear_label, data.pixel_tolerance, vocabulary)


def select_rows(rows: Dataset, data: DataArguments) -> Dataset:
    """The first `limit` records whose words are wanted, shuffled before where that is asked for."""
    if data.include or data.exclude:
        words = (data.include, data.exclude, data.match)
        name = next(name for name in ("prompts", "prompt", "instruction") if name in rows.column_names)
        texts = map("\n".join, rows["prompts"]) if name == "prompts" else rows[name]
        wanted = [i for i, text in enumerate(texts) if sources.keeps(text, *words)]
        if not wanted:
            raise ValueError(f"{data.path}: none of {len(rows)} records is left; relax include and exclude.")
        rows = rows.select(wanted)
    rows = rows.shuffle(seed=data.split_seed) if data.shuffle else rows
    return rows.select(range(min(data.limit, len(rows)))) if data.limit else rows


def split_records(
    records: Dataset,
    rows: Dataset | None,
    data: DataArguments,
    parts: Sequence[str] = PARTS,
    origins: Sequence[Sequence[str]] | None = None,
) -> PreparedData:
    """Holds records out for calibration and test: whole groups of those that share a picture or a session.

    Args:
        records: labelled or prompts, with `key` and `origins`.
        rows: the photo pairs that they came from; those that were skipped are in none of the parts.
        origins: instead of the records' own.
    """
    wanted = {"test": data.eval_samples, "calibration": data.calibration_edits}
    if not {"source", "copied"} & set(records.column_names):
        wanted["calibration"] = 0  # which edits pictures
    counts = {part: count for part, count in held_out_counts(len(records), wanted).items() if count}
    groups = group_records(records["origins"][:] if origins is None else origins)
    found = dict(zip(counts, hold_out(groups, list(counts.values()), data.split_seed)))
    for part, count in counts.items():
        if not len(found[part]):
            raise ValueError(
                f"No record can be held out for {part}: {len(records)} records form {groups.max() + 1} groups that "
                f"share pictures or sessions, the largest of {np.bincount(groups).max()}. Add other pictures, or set "
                "eval_samples or calibration_edits to 0."
            )
        if len(found[part]) < count:
            logger.warning("%s: %d records, since groups that share pictures stay whole", part, len(found[part]))
    held_out = np.concatenate([np.zeros(0, int), *found.values()])
    found["train"] = np.setdiff1d(np.arange(len(records)), held_out)
    places = {key: i for i, key in enumerate(rows["key"])} if rows is not None else {}
    result = PreparedData()
    for part in [part for part in parts if part in found]:
        setattr(result, part, chosen := records.select(found[part]))
        if rows is not None:
            result.rows[part] = rows.select([places[key] for key in chosen["key"]])
    return result


def held_out_counts(records: int, wanted: dict[str, int]) -> dict[str, int]:
    """How many records each part gets: what is wanted, or where that is over half of them, a quarter at most."""
    if sum(wanted.values()) <= records // 2:
        return wanted
    quarter = max(1, records // 4)
    counts = {part: min(count, quarter) for part, count in wanted.items()}
    if sum(counts.values()) >= records:
        raise ValueError(
            f"{records} records are too few to hold some out (eval_samples={wanted['test']}, "
            f"calibration_edits={wanted['calibration']}); add data, or set these to 0"
        )
    logger.warning(
        "%d records: %d for evaluation (eval_samples=%d) and %d for calibration (calibration_edits=%d), so that at "
        "least half is left to train on",
        *(records, counts["test"], wanted["test"], counts["calibration"], wanted["calibration"]),
    )
    return counts


def pull_dataset(name_or_path: str, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of prepared data, `load_encoded` reads it: a local one, or a data set from the Hub."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    wanted = [INFO_FILE, *DATASET_FILES]
    folder = Path(
        snapshot_download(name_or_path, repo_type="dataset", revision=revision, token=token, allow_patterns=wanted)
    )
    if not (folder / INFO_FILE).is_file():
        raise FileNotFoundError(
            f"The data set {name_or_path} has no {INFO_FILE}: it was not written by `thinkclearly push`. Read photo "
            "pairs from the Hub with --source magicbrush."
        )
    return folder
