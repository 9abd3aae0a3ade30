"""Prompts to draw: pairs of captions that differ in one thing, with or without their pictures, and single prompts.

Every reader returns the same columns (`PROMPTS`) with pictures still encoded; `read_images` decodes and checks those
of a row. Knows nothing of rewards, tokens or models.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from thinkclearly.data.magicbrush import COLUMNS, load_table
from thinkclearly.data.samples import SAMPLES
from thinkclearly.data.shapes import Scene, edit_scene, random_scene
from thinkclearly.data.sources import OFFSETS, PARTS, BadRecord, dataset_of_files, read_json, text_of
from thinkclearly.images import ImageError, load_image

logger = logging.getLogger(__name__)

PROMPTS = datasets.Features(
    {
        "key": datasets.Value("string"),
        "prompts": datasets.List(datasets.Value("string")),
        "images": datasets.List(datasets.Image(decode=False)),
        "scene": datasets.List(datasets.Value("string")),
    }
)
NAMES = {  # our name -> the names that files and tables use, best first
    "prompt1": ("prompt1", "source_caption", "original_prompt"),
    "prompt2": ("prompt2", "target_caption", "edited_prompt"),
    "image1": ("image1", *COLUMNS["source"]),
    "image2": ("image2", *COLUMNS["target"]),
}
KINDS = ("colour", "place", "shape", "count", "background", "two")
_OPERATIONS = {"colour": "recolour", "place": "move", "shape": "replace", "background": "background"}


def read_images(row: Mapping) -> list[Image.Image]:
    """The pictures of a row's prompts: RGB, each of its own size, or []. Raises `BadRecord`, which names the file."""
    try:
        return [load_image(picture, _label(row["key"], i, picture)) for i, picture in enumerate(row["images"], 1)]
    except ImageError as error:
        raise BadRecord(str(error)) from error


def _label(key: str, number: int, picture: Mapping) -> str:
    return f"{key}: image{number}" + (f" {picture['path']}" if picture["path"] else "")


# Files


def read_pairs(path: str | os.PathLike, on_bad_record: str = "error", split: str = "train") -> datasets.Dataset:
    """Pairs of prompts from a JSON array or JSON lines, single prompts from a text file, or `edit_pairs` of a table.

    A record is FocusDiff's `{prompt1, prompt2, image1, image2}`, or an edit with captions: `{source_caption,
    target_caption, input_image, output_image}` and other names that edit data uses (`NAMES`). Pictures that are null
    or absent make a pair of prompts alone. Their paths are absolute or relative to the file's directory. Of a `.txt`
    every line that is not blank is a prompt of its own. [FocusDiff](https://github.com/wendell0218/FocusDiff)'s
    `mydataset.py` uses only the first half of the pairs, and joins two lines to an item, so that an odd one is lost;
    here all are read.

    Args:
        on_bad_record: "error" stops at a bad record, "skip" leaves it out and logs how many.
        split: of a table.

    Returns:
        `PROMPTS`; a key is `FILE[index]` of an array, `FILE:line` of lines.

    Raises:
        BadRecord: the file cannot be read, a prompt is missing or empty, or a picture's file, or one picture of two.
        ValueError: no record is left.
    """
    path = Path(path)
    readers = {".txt": _prompt_of_line, ".json": _pair_of_record, ".jsonl": _pair_of_line}
    if path.suffix not in readers:
        return edit_pairs(os.fspath(path), on_bad_record, split)
    read = partial(readers[path.suffix], root=path.parent)
    records = list(_records(path))
    rows = _usable(read, records, on_bad_record)
    if not rows:
        raise ValueError(f"{path}: none of {len(records)} records can be used; expected pairs, or a prompt a line.")
    return dataset_of_files(rows, PROMPTS)


def _usable(read: Callable, records: Iterable[tuple[str, object]], on_bad_record: str) -> list[dict]:
    """Rows of `PROMPTS`."""
    rows, bad = [], []
    for key, record in records:
        try:
            rows.append(read(key, record))
        except BadRecord as error:
            if on_bad_record == "error":
                raise
            bad.append(str(error))
    if bad:
        logger.warning("skipped %d bad records, the first: %s", len(bad), bad[0])
    return rows


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """Keys with the members of an array, or with lines as they stand."""
    if path.suffix == ".json":
        yield from ((f"{path.name}[{i}]", record) for i, record in enumerate(read_json(path, list)))
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from ((f"{path.name}:{i}", line) for i, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecord(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def _prompt_of_line(key: str, line: str, root: Path) -> dict:
    return {"key": key, "prompts": [line.strip()], "images": [], "scene": []}


def _pair_of_line(key: str, line: str, root: Path) -> dict:
    try:
        return _pair_of_record(key, json.loads(line), root)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadRecord(f"{key}: not JSON ({error}); is the line whole?") from error


def _pair_of_record(key: str, record, root: Path) -> dict:
    if not isinstance(record, dict):
        raise BadRecord(f"{key}: found {type(record).__name__}, expected an object with 'prompt1' and 'prompt2'.")
    found = {ours: next((record[name] for name in names if name in record), None) for ours, names in NAMES.items()}
    for name in ("image1", "image2"):
        found[name] = _file_of(found[name], root, f"{key}: {name}")
    return _pair(key, found)


def _file_of(value, root: Path, where: str) -> dict | None:
    """As a picture of `datasets`; ShareGPT-4o-Image writes lists of paths."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None or value == []:
        return None
    if not isinstance(value, str) or not os.path.isfile(root / value):
        raise BadRecord(f"{where} is {value!r:.200}, expected the path of a file, absolute or from {root}.")
    return {"path": str(root / value), "bytes": None}


def _pair(key: str, found: Mapping) -> dict:
    prompts = [text_of(found[name], key, name).strip() for name in ("prompt1", "prompt2")]
    if not all(prompts):
        known = " and ".join("/".join(NAMES[name]) for name in ("prompt1", "prompt2"))
        raise BadRecord(f"{key}: a prompt is missing or empty; expected two, as {known}.")
    images = [image for image in (found.get("image1"), found.get("image2")) if image]
    if len(images) == 1:
        raise BadRecord(f"{key}: one picture of two; expected both, or none for prompts alone.")
    return {"key": key, "prompts": prompts, "images": images, "scene": []}


# Tables


def edit_pairs(path_or_id: str, on_bad_record: str = "error", split: str = "train") -> datasets.Dataset:
    """Pairs from a table of edits that has a caption of each picture, such as UltraEdit's.

    The pictures are copied into the cache of `datasets`: of a large table take a part, `train[:20000]`.

    Args:
        path_or_id: a Hub id, a Parquet file or a folder that `datasets.load_dataset` understands.
        on_bad_record: as for `read_pairs`.

    Returns:
        `PROMPTS`; a key is `SPLIT[row]`, or `FILE[row]` of a Parquet file.

    Raises:
        BadRecord: a caption is missing or empty, or one picture of two is.
        ValueError: no columns with captions, or no record is left.
    """
    table = load_table(path_or_id, split)
    names = {ours: next((name for name in known if name in table.column_names), None) for ours, known in NAMES.items()}
    if missing := [f"{ours} ({', '.join(NAMES[ours])})" for ours in ("prompt1", "prompt2") if names[ours] is None]:
        raise ValueError(
            f"{path_or_id}: no column for {'; '.join(missing)}. Found: {', '.join(table.column_names)}. Rename the "
            "columns of the table."
        )
    found = {name: ours for ours, name in names.items() if name is not None}
    table = table.select_columns(list(found)).rename_columns(found)
    for name in {"image1", "image2"} & set(table.column_names):
        table = table.cast_column(name, datasets.Image(decode=False))
    prefix = Path(path_or_id).name if Path(path_or_id).is_file() else split
    rows = table.map(
        partial(_pairs_of_table, prefix=prefix, on_bad_record=on_bad_record),
        with_indices=True,
        batched=True,
        features=PROMPTS,
        remove_columns=table.column_names,
        desc="pairs",
    )
    if not len(rows):
        raise ValueError(f"{path_or_id}: none of {len(table)} records can be used.")
    return rows


def _pairs_of_table(batch: Mapping[str, list], indices: list[int], prefix: str, on_bad_record: str) -> dict[str, list]:
    records = [(f"{prefix}[{i}]", dict(zip(batch, values))) for i, values in zip(indices, zip(*batch.values()))]
    rows = _usable(_pair, records, on_bad_record)
    return {name: [row[name] for row in rows] for name in PROMPTS}


# Supervised training


def pair_samples(rows: datasets.Dataset) -> datasets.Dataset:
    """Each picture of `rows` (`PROMPTS`) with its prompt, as text-to-image records of supervised training (`SAMPLES`).

    A prompt without a picture becomes a record without a target, which `read_sample` refuses by its key.
    """
    return rows.map(_samples_of, batched=True, remove_columns=rows.column_names, features=SAMPLES, desc="samples")


def _samples_of(batch: Mapping[str, list]) -> dict[str, list]:
    samples = {name: [] for name in SAMPLES}
    for key, prompts, images in zip(batch["key"], batch["prompts"], batch["images"]):
        for number, prompt in enumerate(prompts, 1):
            target = images[number - 1] if images else None
            values = (f"{key}.{number}", prompt, [], target, None, key)
            for column, value in zip(samples.values(), values, strict=True):
                column.append(value)
    return samples


# Built in


def shape_pairs(
    count: int, split: str = "train", seed: int = 0, size: int = 64, shapes: int | None = None
) -> datasets.Dataset:
    """`count` pairs of captions of the built-in shapes that differ in one thing, with both pictures and scenes.

    Kinds take turns: `KINDS` of the pair's number. "count" is one shape more or less, "two" any two of the others but
    that. All stand on plain backgrounds that the caption names: it then says everything that a picture is judged by,
    and what lies behind a shape is known, without which its outline could not be judged.

    Args:
        split: "train", "calibration" and "test" share no caption, whatever their seeds.
        size: side of the square pictures, pixels.
        shapes: on the first scene of each pair; one to three if not given.

    Returns:
        `PROMPTS`; a key is `KIND[SEED:NUMBER]`. Pair i of a split and seed is always the same pair.

    Raises:
        ValueError: an unknown split, or a count below 1.
    """
    if split not in PARTS or count < 1:
        raise ValueError(f"shape_pairs: split={split!r}, count={count}; expected {', '.join(PARTS)} and 1 or more.")
    rows = []
    for number in range(OFFSETS[split], OFFSETS[split] + count):
        kind = KINDS[number % len(KINDS)]
        scenes = _pair_of_scenes(kind, split, np.random.default_rng((seed, number)), shapes)
        rows.append(
            {
                "key": f"{kind}[{seed}:{number}]",
                "prompts": [scene.caption() for scene in scenes],
                "images": [{"path": None, "bytes": _png(scene, size)} for scene in scenes],
                "scene": [scene.to_json() for scene in scenes],
            }
        )
    return datasets.Dataset.from_list(rows, features=PROMPTS)


def _pair_of_scenes(kind: str, split: str, rng: np.random.Generator, shapes: int | None) -> tuple[Scene, Scene]:
    while True:
        before = edit_scene(random_scene(rng, [], shapes), "background", rng).after
        after = before
        for operation in _operations(kind, len(before.shapes), rng):
            after = edit_scene(after, operation, rng).after
        if part_of(before.caption()) == part_of(after.caption()) == split:
            return before, after


def _operations(kind: str, shapes: int, rng: np.random.Generator) -> list[str]:
    if kind == "two":
        return [str(name) for name in rng.choice(list(_OPERATIONS.values()), 2, replace=False)]
    if kind == "count":
        return [{1: "add", 3: "remove"}.get(shapes) or str(rng.choice(["add", "remove"]))]
    return [_OPERATIONS[kind]]


def part_of(caption: str) -> str:
    """The only part that a caption may be in: half of all captions are for training, a quarter for each other part."""
    return ("train", "train", "calibration", "test")[hashlib.sha256(caption.encode()).digest()[0] % 4]


def _png(scene: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    scene.render(size).save(buffer, "PNG")
    return buffer.getvalue()
