"""MagicBrush, and tables like it: from a Hub id, a Parquet file or a folder, filtered and shuffled.

Knows the names that tables give their columns. Rows are those of `data.sources`, with pictures still encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np

from thinkclearly.data.sources import FEATURES, keeps

logger = logging.getLogger(__name__)

COLUMNS = {  # our name -> the names tables use, best first
    "instruction": ("instruction", "edit_instruction", "edit_prompt", "input_prompt", "prompt", "edit"),
    "source": ("source_img", "source", "source_image", "input_image", "original_image", "input"),
    "target": ("target_img", "target", "target_image", "edited_image", "output_image", "output"),
    "mask": ("mask_img", "mask", "mask_image", "edit_mask"),
    "session": ("img_id",),
}
OPTIONAL = ("mask", "session")
SHUFFLE_BUFFER = 1000  # records a streamed table holds back to shuffle among


def magicbrush(
    path_or_id: str = "osunlp/MagicBrush",
    split: str = "train",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    match: str = "any",
    turn_index: int | None = None,
    shuffle_seed: int | None = None,
    limit: int | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """A table of edits with MagicBrush's columns, or other common names for them.

    Args:
        path_or_id (`str`): a Hub id, a Parquet file, or a folder that `datasets.load_dataset` understands.
        split (`str`, defaults to `"train"`): not used for a single Parquet file.
        include (`Sequence[str]`): keep instructions that contain these, upper and lower case alike.
        exclude (`Sequence[str]`): drop instructions that contain any of these.
        match (`str`, defaults to `"any"`): whether `"any"` or `"all"` of `include` must occur.
        turn_index (`int`, *optional*): keep only this turn of multi-turn sessions, counted from 1.
        shuffle_seed (`int`, *optional*): shuffle; when streaming, among `SHUFFLE_BUFFER` records at a time.
        limit (`int`, *optional*): keep at most this many records, after filtering and shuffling.

    Returns:
        `datasets.Dataset` or, when streaming, `datasets.IterableDataset`: `FEATURES`; a key is `dev[12]`, the row
        counted before filtering, and `session` is MagicBrush's `img_id`, where there is one.

    Raises:
        ValueError: an unknown `match`, a column that cannot be found, or no record left.
        FileNotFoundError: a Parquet file that is not there.
    """
    if match not in ("any", "all"):
        raise ValueError(f"match={match!r}: expected 'any' or 'all'.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1, or none.")
    table = load_table(path_or_id, split, streaming)
    prefix = Path(path_or_id).name if Path(path_or_id).is_file() else split
    if streaming and table.features is None:
        table = table._resolve_features()
    names = _find_columns(table.column_names, str(path_or_id), turn_index is not None)
    for name in [n for n in ("source", "target", "mask", "session") if n in names]:  # before pictures are decoded
        table = table.cast_column(names[name], FEATURES[name])
    table = table.select_columns(list(names.values()))
    table = table.rename_columns({found: name for name, found in names.items() if found != name})
    keep = partial(_keep, include=include, exclude=exclude, match=match, turn=turn_index)
    tested = ["instruction", "turn_index"] if turn_index is not None else ["instruction"]
    if streaming:
        table = table.skip(0)  # freezes the order of the files: a shuffled row's key still tells where it is
        table = table.map(_with_key, with_indices=True, fn_kwargs={"prefix": prefix}, features=_with_turn(names))
        table = table.filter(keep, input_columns=tested)
        table = table if shuffle_seed is None else table.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        return (table if limit is None else table.take(limit)).select_columns(list(FEATURES))
    rows = [i for i, values in enumerate(zip(*(table[column] for column in tested))) if keep(*values)]
    if shuffle_seed is not None:
        np.random.default_rng(shuffle_seed).shuffle(rows)
    logger.info("%s: %d of %d records pass the filters", path_or_id, len(rows), len(table))
    if not rows[:limit]:
        raise ValueError(f"{path_or_id}: none of {len(table)} records is left; relax include, exclude, limit or turn.")
    for name in [n for n in OPTIONAL if n not in names]:
        table = table.add_column(name, [None] * len(table), feature=FEATURES[name])
    table = table.add_column("key", [f"{prefix}[{i}]" for i in range(len(table))], feature=FEATURES["key"])
    return table.select(rows[:limit]).select_columns(list(FEATURES))


def load_table(path_or_id: str, split: str, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """A table with all its columns: a Hub id, a Parquet file, or a folder that `datasets.load_dataset` understands."""
    local = Path(path_or_id)
    if local.suffix == ".parquet" and not local.is_file():
        raise FileNotFoundError(f"{local}: no such file. Check the path.")
    if local.is_file() and local.suffix != ".parquet":
        raise ValueError(f"{local}: not a table; expected a .parquet file, a folder or a data set on the Hub")
    if local.is_file():
        return datasets.load_dataset("parquet", data_files=str(local), split="train", streaming=streaming)
    return datasets.load_dataset(str(path_or_id), split=split, streaming=streaming)


def _find_columns(found: list[str], where: str, with_turn: bool) -> dict[str, str]:
    """Our column name -> the table's; mask and session are optional."""
    names = {name: next((c for c in known if c in found), None) for name, known in COLUMNS.items()}
    if with_turn:
        names["turn_index"] = "turn_index" if "turn_index" in found else None
    missing = [name for name, column in names.items() if column is None and name not in OPTIONAL]
    if missing:
        known = "; ".join(f"{name} ({', '.join(COLUMNS.get(name, (name,)))})" for name in missing)
        raise ValueError(
            f"{where}: no column for {known}. Found: {', '.join(found)}. Rename the columns of the table."
        )
    return {name: column for name, column in names.items() if column is not None}


def _keep(instruction: str | None, turn_found: int | None = None, *, include, exclude, match, turn) -> bool:
    return turn_found == turn and keeps(instruction, include, exclude, match)


def _with_key(row: dict, index: int, prefix: str) -> dict:
    return {"mask": None, "session": None, **row, "key": f"{prefix}[{index}]"}


def _with_turn(names: Mapping[str, str]) -> datasets.Features:
    return datasets.Features(
        {**FEATURES, **({"turn_index": datasets.Value("int64")} if "turn_index" in names else {})}
    )
