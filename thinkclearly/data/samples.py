"""Records of supervised training: pictures from words, edits of one or several pictures, answers about pictures.

Every reader returns the same columns (`SAMPLES`) with pictures still encoded; `read_sample` decodes and checks a row.
Photo pairs for instruction tokens are `data.sources`'s. Knows nothing of squares, tokens or models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
from PIL import Image

from thinkclearly.data.sources import BadRecord, dataset_of_files, inside, read_json, text_of
from thinkclearly.images import ImageError, load_image

SAMPLES = datasets.Features(
    {
        "key": datasets.Value("string"),
        "instruction": datasets.Value("string"),
        "sources": datasets.List(datasets.Image(decode=False)),
        "target": datasets.Image(decode=False),
        "answer": datasets.Value("string"),
        "session": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class Sample:
    """One record: RGB pictures that are shown, words, and either the picture to draw or the answer to give."""

    sources: list[Image.Image]
    instruction: str
    target: Image.Image | None
    answer: str | None
    key: str = ""


def read_sample(row: Mapping) -> Sample:
    """Decodes and checks one row. Raises `BadRecord`, whose message starts with the row's key."""
    key, instruction = row["key"], (row["instruction"] or "").strip()
    if not instruction:
        raise BadRecord(f"{key}: the words are empty; expected a prompt, an instruction or a question.")
    answer = row["answer"]
    if (row["target"] is None) == (answer is None):
        found = "neither" if answer is None else "both"
        raise BadRecord(f"{key}: found {found}, expected a picture to draw or an answer, and not both.")
    if answer is not None and not answer.strip():
        raise BadRecord(f"{key}: the answer is empty; expected words.")
    try:
        sources = [load_image(picture, f"{key}: input {i}") for i, picture in enumerate(row["sources"])]
        target = None if row["target"] is None else load_image(row["target"], f"{key}: target")
    except ImageError as error:
        raise BadRecord(str(error)) from error
    return Sample(sources, instruction, target, answer and answer.strip(), key)


def sharegpt4o_samples(path: str | os.PathLike) -> datasets.Dataset:
    """All records of a JSON array in ShareGPT-4o-Image's layout, mixed as they come.

    `input_prompt` are the words. `input_image` lists the pictures that are shown: absent, `[]` or null for
    text-to-image. `output_image` is the picture to draw; instead of it, `output_text` is the answer to give, which
    ShareGPT-4o-Image itself does not have. Paths are relative to the JSON's directory. A key is `FILE[index]`.

    Raises:
        BadRecord: the file is not a JSON array, or a record is malformed or names a file outside the directory.
    """
    path = Path(path)
    rows = []
    for index, record in enumerate(read_json(path, list)):
        key = f"{path.name}[{index}]"
        if not isinstance(record, dict):
            raise BadRecord(f"{key}: found {type(record).__name__}, expected an object with 'input_prompt'.")
        inputs = record.get("input_image") or []
        if not isinstance(inputs, list):
            raise BadRecord(f"{key}: 'input_image' is {type(inputs).__name__}, expected a list of paths.")
        target = record.get("output_image")
        answer = record.get("output_text")
        if (target is None) == (answer is None):
            raise BadRecord(f"{key}: expected one of 'output_image' and 'output_text', the picture or the answer.")
        pictures = [inside(path.parent, name, f"{key}: input_image") for name in inputs]
        rows.append(
            {
                "key": key,
                "instruction": text_of(record.get("input_prompt"), key, "input_prompt"),
                "sources": [{"path": str(picture), "bytes": None} for picture in pictures],
                "target": target and {"path": str(inside(path.parent, target, f"{key}: output_image")), "bytes": None},
                "answer": None if answer is None else text_of(answer, key, "output_text"),
                "session": None,
            }
        )
    if not rows:
        raise ValueError(f"{path}: no record; expected an array of objects with 'input_prompt'.")
    return dataset_of_files(rows, SAMPLES)


def captioned_pictures(path: str | os.PathLike) -> datasets.Dataset:
    """A folder of pictures and captions by the `imagefolder` convention of `datasets`: text-to-image records.

    `metadata.jsonl` (or `.csv`, `.parquet`) beside the pictures has `file_name` and `text`.

    Raises:
        ValueError: no pictures, or no column `text`.
    """
    try:
        table = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
    except FileNotFoundError as error:  # whichever of the library's kinds of it
        raise ValueError(f"{path}: no pictures here; expected pictures and a metadata.jsonl beside them.") from error
    if "text" not in table.column_names:
        raise ValueError(
            f"{path}: columns {', '.join(table.column_names)}; expected 'text', the caption of each picture, from a "
            'metadata.jsonl whose lines read {"file_name": "0001.png", "text": "a red star"}.'
        )
    table = table.cast_column("image", datasets.Image(decode=False))
    names = [Path(picture["path"] or "").name for picture in table["image"]]
    rows = table.map(
        lambda row, index: {
            "key": f"{names[index]}[{index}]",
            "instruction": row["text"],
            "sources": [],
            "target": row["image"],
            "answer": None,
            "session": None,
        },
        with_indices=True,
        remove_columns=table.column_names,
        features=SAMPLES,
        desc="captions",
    )
    return rows
