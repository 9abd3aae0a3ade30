"""The field's benchmarks as tables: MagicBrush's editing sessions and PIE-Bench.

Knows their files and mask encodings; pictures stay encoded. Knows nothing of models or metrics.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from thinkclearly.data.magicbrush import load_table, magicbrush
from thinkclearly.data.sources import FEATURES, BadRecord, inside, read_json

TURNS = datasets.Features(
    {
        **FEATURES,
        "turn": datasets.Value("int32"),
        "caption": datasets.Value("string"),
    }
)
PIE_EDITS = datasets.Features(
    {
        "key": datasets.Value("string"),
        "instruction": datasets.Value("string"),
        "image": datasets.Image(decode=False),
        "caption": datasets.Value("string"),
        "mask_runs": datasets.List(datasets.Value("int32")),
    }
)
SESSIONS_FILE = "edit_sessions.json"
CAPTION_FILES = ("local_descriptions.json", "local_captions.json")  # one content; the authors use both names
PIE_FILE, PIE_IMAGES = "mapping_file.json", "annotation_images"
PIE_SIDE = 512


def magicbrush_turns(path_or_id: str = "osunlp/MagicBrush", split: str = "dev") -> datasets.Dataset:
    """MagicBrush in sessions: each row one turn, rows of a session next to each other and in order.

    The test split is not on the Hub. The authors give it as an archive; unpack it and give the folder that holds
    `edit_sessions.json` and `images/`. Its local descriptions are what the paper's CLIP-T compares with.

    Args:
        path_or_id (`str`): that folder; or a table as `data.magicbrush` reads it, with `img_id` and
            `turn_index`, which has no captions.
        split (`str`, defaults to `"dev"`): of a table.

    Returns:
        `datasets.Dataset`: `TURNS`; `key` is `SESSION-TURN`, turns count from 1, `caption` may be `None`.

    Raises:
        ValueError: a table without the two columns, or a session whose turns are not 1, 2, ….
        BadRecord: a file that is malformed or names a picture outside the folder.
    """
    folder = Path(path_or_id)
    if folder.is_dir() and (folder / SESSIONS_FILE).is_file():
        return _of_archive(folder)
    table = load_table(path_or_id, split)
    missing = [name for name in ("img_id", "turn_index") if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path_or_id}: no column {' or '.join(missing)}, which say what belongs together. Found: "
            f"{', '.join(table.column_names)}. Give MagicBrush itself, or a folder with {SESSIONS_FILE}."
        )
    sessions, turns = [str(name) for name in table["img_id"]], table["turn_index"][:]
    first = {name: i for i, name in reversed(list(enumerate(sessions)))}
    order = sorted(range(len(sessions)), key=lambda i: (first[sessions[i]], turns[i]))
    added = {
        "key": [f"{session}-{turn}" for session, turn in zip(sessions, turns)],
        "turn": turns,
        "caption": [None] * len(turns),
    }
    rows = magicbrush(path_or_id, split=split).remove_columns("key")
    for name, values in added.items():
        rows = rows.add_column(name, values, feature=TURNS[name])
    rows = rows.select(order)  # last: adding a column to a selection would copy all its pictures
    return _checked(rows, path_or_id)


def _of_archive(folder: Path) -> datasets.Dataset:
    sessions = read_json(folder / SESSIONS_FILE, dict)
    captions = next((read_json(folder / name, dict) for name in CAPTION_FILES if (folder / name).is_file()), {})
    rows = []
    for session, turns in sessions.items():
        for number, turn in enumerate(turns if isinstance(turns, list) else [], start=1):
            key = f"{session}-{number}"
            if not isinstance(turn, dict) or not isinstance(turn.get("instruction"), str):
                raise BadRecord(f"{SESSIONS_FILE}: {key} is {turn!r:.60}, expected an object with an instruction.")
            row = {"key": key, "session": session, "turn": number, "instruction": turn["instruction"]}
            for side, name in (("source", "input"), ("target", "output"), ("mask", "mask")):
                file = turn.get(name)
                relative = f"images/{session}/{file}" if isinstance(file, str) else file
                picture = inside(folder, relative, f"{SESSIONS_FILE}: {key}: {name}")
                row[side] = {"path": str(picture), "bytes": None}
            described = captions.get(session) or {}
            rows.append(row | {"caption": described.get(turn["output"])})
    if not rows:
        raise ValueError(f"{folder / SESSIONS_FILE} holds no session with turns; is it complete?")
    return _checked(datasets.Dataset.from_list(rows, features=TURNS), str(folder))


def _checked(rows: datasets.Dataset, where: str) -> datasets.Dataset:
    before = (None, 0)
    for session, turn in zip(rows["session"], rows["turn"]):
        expected = before[1] + 1 if session == before[0] else 1
        if turn != expected:
            raise ValueError(f"{where}: session {session} has turn {turn} where {expected} should be. Only a part?")
        before = (session, turn)
    return rows


def pie_bench(path: str | os.PathLike) -> datasets.Dataset:
    """PIE-Bench's edits, from the folder with `mapping_file.json` and `annotation_images/`.

    Returns:
        `datasets.Dataset`: `PIE_EDITS`. `caption` is the editing prompt without its brackets, which the CLIP numbers
        compare with; `mask_runs` are for `decode_mask`.

    Raises:
        BadRecord: a record without the fields that PnPInversion's README lists, or with a picture outside the folder.
    """
    folder = Path(path)
    rows = []
    for key, record in read_json(folder / PIE_FILE, dict).items():
        where = f"{PIE_FILE}: {key}"
        if not isinstance(record, dict):
            raise BadRecord(f"{where} is {type(record).__name__}, expected an object with 'image_path'.")
        texts = [record.get("editing_instruction"), record.get("editing_prompt")]
        runs = record.get("mask")
        if not all(isinstance(text, str) for text in texts):
            raise BadRecord(f"{where}: 'editing_instruction' and 'editing_prompt' are {texts!r}, expected texts.")
        if not isinstance(runs, list) or len(runs) % 2 or not all(type(n) is int and n >= 0 for n in runs):
            raise BadRecord(f"{where}: 'mask' is {runs!r:.60}, expected a list of start, length, start, length, ….")
        picture = inside(folder / PIE_IMAGES, record.get("image_path"), f"{where}: image_path")
        row = {"key": key, "image": {"path": str(picture), "bytes": None}, "mask_runs": runs}
        rows.append(row | {"instruction": texts[0], "caption": texts[1].replace("[", "").replace("]", "")})
    if not rows:
        raise ValueError(f"{folder / PIE_FILE} holds no record; is it complete?")
    return datasets.Dataset.from_list(rows, features=PIE_EDITS)


def decode_mask(runs: Sequence[int]) -> np.ndarray:
    """PIE-Bench's mask: bool (512, 512), True where edited.

    `runs` are start, length, … in the flattened picture. As in PnPInversion's `evaluation/evaluate.py`, a run ends
    with the picture, and the border of one pixel always counts as edited, "to avoid annotation errors" there.
    """
    mask = np.zeros(PIE_SIDE * PIE_SIDE, bool)
    for start, length in zip(runs[::2], runs[1::2]):
        mask[start : start + length] = True
    mask = mask.reshape(PIE_SIDE, PIE_SIDE)
    mask[[0, -1]] = True
    mask[:, [0, -1]] = True
    return mask
