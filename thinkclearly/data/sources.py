"""Where photo pairs come from: sample folders, ShareGPT-4o-Image, and the built-in shapes; tables are `magicbrush`'s.

Every source returns the same columns (`FEATURES`) with pictures still encoded; `read_example` decodes and checks one
row. Knows nothing of squares, tokens or models.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import PIL
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from tqdm.auto import tqdm

from thinkclearly.data import shapes as shape_generator
from thinkclearly.files import new_folder, write_json
from thinkclearly.images import ImageError, load_image, load_mask

logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        "key": datasets.Value("string"),
        "instruction": datasets.Value("string"),
        "source": datasets.Image(decode=False),
        "target": datasets.Image(decode=False),
        "mask": datasets.Image(decode=False),
        "session": datasets.Value("string"),
    }
)
PARTS = ("train", "calibration", "test")
OFFSETS = {"train": 0, "test": 1_000_000_000, "calibration": 2_000_000_000}  # of a part's first built-in edit


class BadRecord(ValueError):
    """A record that cannot be used; the message names it, says what was found and what was expected."""


@dataclass(frozen=True)
class EditExample:
    """One edit: RGB pictures before and after (sizes may differ), what was asked, and where it was allowed.

    `mask` is mode "L" at the source's size, 255 where edited, or `None` where the record has no usable one.
    """

    source: Image.Image
    target: Image.Image
    instruction: str
    mask: Image.Image | None = None
    key: str = ""


def read_example(row: Mapping) -> EditExample:
    """Decode and check one row of a source. Raises `BadRecord`, whose message starts with the row's key."""
    key = row["key"]
    instruction = (row["instruction"] or "").strip()
    if not instruction:
        raise BadRecord(f"{key}: the instruction is empty; expected what to change, in words.")
    try:
        source, target = (load_image(row[side] or {}, _label(row, side)) for side in ("source", "target"))
        mask = load_mask(row["mask"], _label(row, "mask")) if row["mask"] else None
    except ImageError as error:
        raise BadRecord(str(error)) from error
    if row["mask"] and mask is None:
        _warn_once("Some masks are colour pictures without transparency; these tell nothing and are ignored.")
    if mask is not None and mask.size != source.size:  # MagicBrush stores some masks at other sizes
        mask = mask.resize(source.size, Image.Resampling.NEAREST)
    return EditExample(source, target, instruction, mask, key)


def _label(row: Mapping, side: str) -> str:
    path = (row[side] or {}).get("path")
    return f"{row['key']}: {side}" + (f" {path}" if path else "")


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def folder(path: str | os.PathLike) -> datasets.Dataset:
    """Directories `sample_XXXX/` of `source.png`, `target.png`, an optional `mask.png` and `metadata.json`.

    `metadata.json` is an object with `instruction`; `source`, `target` and `mask` in it may name other files of the
    same directory. Pictures are opened by `read_example` only.

    Raises:
        FileNotFoundError: no `sample_*` directory.
        BadRecord: metadata that is missing, is not a JSON object, or names a file outside its directory.
    """
    root = Path(path)
    samples = sorted((p for p in root.glob("sample_*") if p.is_dir()), key=lambda p: (len(p.name), p.name))
    if not samples:
        raise FileNotFoundError(f"{root}: no directory named sample_*; expected sample_0000/source.png and so on.")
    rows = []
    for sample in samples:
        metadata = read_json(sample / "metadata.json", dict)
        instruction = text_of(metadata.get("instruction"), sample.name, "instruction")
        row = {"key": sample.name, "instruction": instruction, "session": None}
        for side in ("source", "target", "mask"):
            given = metadata.get(side, f"{side}.png")
            picture = inside(sample, given, f"{sample / 'metadata.json'}: {side}")
            absent = side == "mask" and side not in metadata and not picture.exists()
            row[side] = None if absent else {"path": str(picture), "bytes": None}
        rows.append(row)
    return dataset_of_files(rows)


def write_folder(examples: Iterable[EditExample], path: str | os.PathLike) -> int:
    """Write examples in the layout that `folder` reads; returns how many.

    A sample appears under its name only when it is complete; those of the same export are found again, so that one
    which was interrupted goes on.

    Raises:
        FileExistsError: `path` holds samples of another export.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    count = 0
    for example in tqdm(examples, desc="Writing samples", unit="sample", disable=None):
        name, metadata = f"sample_{count:04d}", {"instruction": example.instruction, "key": example.key}
        count += 1
        if (root / name).is_dir():
            if read_json(root / name / "metadata.json", dict) != metadata:
                raise FileExistsError(f"{root / name} is of another export; choose another folder or remove it first.")
            continue
        with new_folder(root / name) as sample:
            for side in ("source", "target", "mask"):
                picture = getattr(example, side)
                if picture is not None:
                    picture.save(sample / f"{side}.png")
            write_json(sample / "metadata.json", metadata)
    return count


def keeps(instruction: str | None, include: Sequence[str], exclude: Sequence[str], match: str) -> bool:
    """Whether an instruction holds any or all (`match`) of the words to include and none to exclude, in any case."""
    text = (instruction or "").lower()
    wanted = not include or (any if match == "any" else all)(word.lower() in text for word in include)
    return wanted and not any(word.lower() in text for word in exclude)


def sharegpt4o(path: str | os.PathLike, limit: int | None = None) -> datasets.Dataset:
    """The edits of a ShareGPT-4o-Image JSON array: records with exactly one `input_image`.

    Text-to-image records (`input_image` absent, empty or null) and those with several input images are skipped,
    counted and logged. Paths are relative to the JSON's directory. A key is `FILE[index in the array]`.

    Raises:
        BadRecord: the file is not a JSON array, or a record is malformed or names a file outside the directory.
        ValueError: there is no edit in the file.
    """
    path = Path(path)
    rows, without, several = [], 0, 0
    for index, record in enumerate(read_json(path, list)):
        if limit is not None and len(rows) >= limit:
            break
        key = f"{path.name}[{index}]"
        if not isinstance(record, dict):
            raise BadRecord(f"{key}: found {type(record).__name__}, expected an object with 'input_prompt'.")
        inputs = record.get("input_image") or []
        if not isinstance(inputs, list):
            raise BadRecord(f"{key}: 'input_image' is {type(inputs).__name__}, expected a list of paths.")
        without += not inputs
        several += len(inputs) > 1
        if len(inputs) == 1:
            source = inside(path.parent, inputs[0], f"{key}: input_image")
            target = inside(path.parent, record.get("output_image"), f"{key}: output_image")
            rows.append(
                {
                    "key": key,
                    "instruction": text_of(record.get("input_prompt"), key, "input_prompt"),
                    "source": {"path": str(source), "bytes": None},
                    "target": {"path": str(target), "bytes": None},
                    "mask": None,
                    "session": None,
                }
            )
    logger.info(
        "%s: %d edits; skipped %d text-to-image records and %d with several input images",
        path, len(rows), without, several,
    )  # fmt: skip
    if not rows:
        raise ValueError(
            f"{path}: no edit with one input image (skipped {without} text-to-image, {several} multi-image records)."
        )
    return dataset_of_files(rows)


def dataset_of_files(rows: list[dict], features: datasets.Features = FEATURES) -> datasets.Dataset:
    """Rows of paths. A picture that changes on disk changes the fingerprint, so that no `map` reuses stale results."""
    lists, single = ("sources", "images"), ("source", "target", "mask")
    pictures = [p for row in rows for p in [*chain(*(row.get(n, []) for n in lists)), *map(row.get, single)] if p]
    paths = [picture["path"] for picture in pictures]
    stamps = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, filter(os.path.exists, paths))]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()
    info = datasets.DatasetInfo(description=f"files {digest}", features=features)
    return datasets.Dataset.from_list(rows, features=features, info=info)


def read_json(path: Path, kind: type):
    """A JSON file whose top level is a `kind`, dict or list. Raises `BadRecord`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadRecord(f"{path}: cannot be read as JSON ({error}). Check that it exists and is complete.") from error
    if not isinstance(content, kind):
        expected = {dict: "an object", list: "an array"}[kind]
        raise BadRecord(f"{path}: the top level is {type(content).__name__}, expected {expected}.")
    return content


def text_of(value, key: str, field: str) -> str:
    """A missing text becomes "", which `read_example` refuses, so that one bad record can be skipped."""
    if value is not None and not isinstance(value, str):
        raise BadRecord(f"{key}: '{field}' is {type(value).__name__}, expected text.")
    return (value or "").encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be stored


def inside(root: Path, relative, where: str) -> Path:
    """`root / relative`, refusing names and links that lead elsewhere. Inside the Hub's cache links are the rule."""
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise BadRecord(f"{where} is {relative!r}, expected a relative path.")
    parts = relative.replace("\\", "/").split("/")
    if os.path.isabs(relative) or Path(relative).drive or ".." in parts:
        raise BadRecord(f"{where} is {relative!r}, which leads outside {root}; expected a path inside it.")
    found, home, cache = (Path(os.path.realpath(path)) for path in (root / relative, root, HF_HUB_CACHE))
    if not found.is_relative_to(cache if home.is_relative_to(cache) else home):
        raise BadRecord(f"{where} is {relative!r}, a link that leads outside {root}, to {found}; put the file there.")
    return root / relative


def shapes(
    count: int,
    size: int,
    seed: int = 0,
    split: str = "train",
    photos_folder: str | os.PathLike | None = None,
    operations: Sequence[str] = shape_generator.OPERATIONS,
) -> datasets.Dataset:
    """`count` built-in edits with true masks, long side `size`, rendered once as PNG into the datasets cache.

    Row i is `random_edit(seed, n, photos, operations)` with n = `OFFSETS[split]` + i; its key is `shapes[seed:n]`.
    The splits "train", "calibration" and "test" share neither edits nor photographs.

    Args:
        photos_folder (`str` or `os.PathLike`, *optional*): draw on the pictures under this folder instead of the
            photographs that scikit-image and this package ship; see `photos_of`.

    Raises:
        ValueError: an unknown split or operation, too few pictures in the folder, or a count below 1.
    """
    unknown = set(operations) - set(shape_generator.OPERATIONS)
    if unknown or not operations:
        raise ValueError(f"operations={operations!r}: expected some of {', '.join(shape_generator.OPERATIONS)}.")
    if count < 1 or size < 32:
        raise ValueError(f"shapes: count={count}, size={size}; expected at least 1 edit of at least 32 pixels.")
    photos = photos_of(split, photos_folder)
    arguments = {
        "numbers": (first := OFFSETS[split], first + count),
        "size": size,
        "seed": seed,
        "photos": tuple(photos),  # a list would be taken for shards
        "operations": tuple(operations),
    }
    files = [(photo, os.stat(photo).st_size, os.stat(photo).st_mtime_ns) for photo in photos]
    code = inspect.getsource(shape_generator) + inspect.getsource(_render_shapes)
    versions = (PIL.__version__, np.__version__, datasets.__version__)
    fingerprint = hashlib.sha256(repr((sorted(arguments.items()), files, code, versions)).encode()).hexdigest()[:32]
    return datasets.Dataset.from_generator(
        _render_shapes, features=FEATURES, gen_kwargs=arguments, fingerprint=fingerprint
    )


def photos_of(split: str, photos_folder: str | os.PathLike | None = None) -> list[str]:
    """The photographs that the built-in edits of "train", "calibration" or "test" are drawn on: paths.

    Of a folder, calibration and test take a fifth of the pictures each, at least one, chosen by the files' bytes:
    copies of a picture under other names stay together.

    Raises:
        ValueError: an unknown split, or fewer than three different pictures in the folder.
    """
    if split not in PARTS:
        raise ValueError(f"split={split!r}: the built-in shapes have {', '.join(PARTS)}.")
    if photos_folder is None:
        return shape_generator.packaged_photos(split)
    copies: dict[str, list[str]] = {}
    for path in pictures_in(photos_folder):
        with open(path, "rb") as file:
            copies.setdefault(hashlib.file_digest(file, "sha256").hexdigest(), []).append(path)
    if len(copies) < len(PARTS):
        raise ValueError(
            f"{photos_folder}: {len(copies)} different pictures; expected 3 or more, since training, calibration and "
            "evaluation draw on photographs of their own."
        )
    order, fifth = sorted(copies), max(1, len(copies) // 5)
    held_out = {"test": order[:fifth], "calibration": order[fifth : 2 * fifth], "train": order[2 * fifth :]}
    return sorted(path for digest in held_out[split] for path in copies[digest])


def pictures_in(folder: str | os.PathLike) -> list[str]:
    """Paths of all pictures under a folder, sorted."""
    root = Path(folder)
    known = Image.registered_extensions()
    photos = sorted(str(p) for p in root.rglob("*") if p.suffix.lower() in known and p.is_file())
    if not photos:
        raise ValueError(f"{root}: no picture in this folder; expected PNG, JPEG or other files that Pillow reads.")
    return photos


def _render_shapes(numbers, size, seed, photos, operations) -> Iterator[dict]:
    for number in range(*numbers):
        edit = shape_generator.random_edit(seed, number, photos, operations)
        row = {"key": f"shapes[{seed}:{number}]", "instruction": edit.instruction, "session": None}
        for side, picture in zip(
            ("source", "target", "mask"), edit.render(*shape_generator.picture_size(seed, number, size))
        ):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            row[side] = {"path": None, "bytes": buffer.getvalue()}
        yield row
