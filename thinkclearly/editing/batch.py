"""Editing at scale: a folder, a JSONL file or a data set through an editor, shared out over processes and resumable.

Knows how items are read, skipped and written. Does not know how an edit is made.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from thinkclearly.data.magicbrush import COLUMNS, load_table
from thinkclearly.data.sources import BadRecord, inside, pictures_in
from thinkclearly.decoding.settings import check_seed
from thinkclearly.editing.editor import Editor
from thinkclearly.files import replacing, write_json
from thinkclearly.images import ImageError, load_image

logger = logging.getLogger(__name__)

ITEMS = datasets.Features(
    {"key": datasets.Value("string"), "instruction": datasets.Value("string"), "image": datasets.Image(decode=False)}
)
RUN_FILE, TABLE_FILE, SKIPPED_FILE = "run.json", "results.parquet", "skipped.json"


@dataclass
class BatchReport:
    """Counts over all processes, and one message for each record that was left out."""

    items: int
    edited: int
    skipped: list[str]


def read_items(
    source: str, instruction: str | None = None, split: str = "train", on_bad_record: str = "error"
) -> tuple[Dataset, list[str]]:
    """Pictures to edit, with columns `key`, `instruction` and `image`, and one message for each bad line.

    Args:
        source: a folder of pictures; a `.jsonl` file with `image` (a path inside the file's folder), `instruction`
            and, if wanted, `key` in each line; or a data set: Hub id, `.parquet` file, or folder of `save_to_disk`.
        instruction: of every item that has none of its own.
        split: of a data set on the Hub.
        on_bad_record: `"error"` stops at the first bad line, `"skip"` leaves it out.

    Raises:
        BadRecord: a line that is not a JSON object with a picture inside the file's folder.
        ValueError, FileNotFoundError: nothing to read, or two items of the same name.
    """
    path, skipped = Path(source), []
    if path.is_dir() and not (path / "dataset_info.json").is_file():
        rows = [(str(Path(file).relative_to(path)), None, {"path": file}) for file in pictures_in(path)]
    elif path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            try:
                rows += [_read_line(path, number, line)] if line.strip() else []
            except BadRecord as error:
                if on_bad_record == "error":
                    raise
                skipped.append(str(error))
    else:
        table = datasets.load_from_disk(source) if path.is_dir() else load_table(source, split)
        return _named(_of_table(table, source, instruction), source), skipped
    columns = {
        "key": [key for key, _, _ in rows],
        "instruction": [own or instruction for _, own, _ in rows],
        "image": [{"bytes": None, **image} for _, _, image in rows],
    }
    return _named(Dataset.from_dict(columns, features=ITEMS), source), skipped


def edit_items(
    editor: Editor,
    items: Dataset,
    output_dir: str | Path,
    *,
    run: dict,
    skipped: Sequence[str] = (),
    batch_size: int = 8,
    num_images: int = 1,
    seed: int = 0,
    on_bad_record: str = "error",
    **overrides,
) -> BatchReport:
    """Edits what is not yet edited; every process of a launch takes its share.

    Each item becomes a folder of `output_dir` named by its key (`EditResult.save`), which appears only when complete,
    so that the same call again goes on. At the end `results.parquet` has one row an item.

    Args:
        items: see `read_items`.
        run: what the results depend on; kept in `run.json`, and a later call that differs is refused.
        skipped: messages about what reading left out.
        on_bad_record: `"error"` stops at a bad item, `"skip"` leaves it out; `skipped.json` lists them.
        overrides: fields of `EditSettings`.

    Raises:
        BadRecord: an item without instruction or with a picture that cannot be read; the message names it.
        ValueError: `output_dir` belongs to another run.
    """
    check_seed(seed)
    output_dir, state = Path(output_dir), PartialState()
    if state.is_main_process:
        _claim(output_dir, run)
    state.wait_for_everyone()
    wanted = list(zip(items["key"], items["instruction"]))
    mine = range(state.process_index, len(items), state.num_processes)
    todo = [i for i in mine if _rows(output_dir, *wanted[i], num_images) is None]
    done, edited, bad = len(mine) - len(todo), 0, []
    with tqdm(total=len(mine), initial=done, desc="edit", unit="picture", disable=not state.is_main_process) as bar:
        for start in range(0, len(todo), batch_size):
            numbers = todo[start : start + batch_size]
            good = []
            for row in items.select(numbers):
                try:
                    good.append((row["key"], *_check(row)))
                except BadRecord as error:
                    if on_bad_record == "error":
                        raise
                    bad.append(str(error))
            if good:
                keys, pictures, instructions = map(list, zip(*good))
                results = editor.edit_many(pictures, instructions, num_images=num_images, seed=seed, **overrides)
                for result, key in zip(results, [key for key in keys for _ in range(num_images)]):
                    result.seconds = {stage: round(s / len(results), 4) for stage, s in result.seconds.items()}
                    _save(result, output_dir / _folder(key, result.sample, num_images))
                edited += len(good)
            bar.update(len(numbers))
    state.wait_for_everyone()
    report = BatchReport(len(items), sum(gather_object([edited])), [*skipped, *gather_object(bad)])
    if state.is_main_process:
        _write_tables(output_dir, wanted, num_images, report.skipped)
    state.wait_for_everyone()
    return report


def _read_line(path: Path, number: int, line: str) -> tuple[str, str | None, dict]:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not a JSON object ({error}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise BadRecord(f"{where}: found {line.strip():.60}; expected an object with 'image' and 'instruction'.")
    texts = {name: record.get(name) for name in ("key", "instruction")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise BadRecord(f"{where}: '{name}' is {value!r:.40}, expected text.")
    picture = inside(path.parent, record["image"], f"{where}: image")
    return texts["key"] or f"{number:06d}", texts["instruction"], {"path": str(picture)}


def _of_table(table: Dataset, source: str, instruction: str | None) -> Dataset:
    names = {}
    for name, known in {"image": ("image", *COLUMNS["source"]), "instruction": COLUMNS["instruction"]}.items():
        names[name] = next((column for column in known if column in table.column_names), None)
    if names["image"] is None or (names["instruction"] is None and instruction is None):
        raise ValueError(
            f"{source}: found columns {', '.join(table.column_names)}; expected 'image' and 'instruction'. Rename "
            "columns, or give one --instruction for all."
        )
    table = table.cast_column(names["image"], ITEMS["image"])
    keys = table["key"] if "key" in table.column_names else [f"{i:06d}" for i in range(len(table))]
    if bad := [i for i, key in enumerate(keys) if not isinstance(key, str) or not key.strip()]:
        raise ValueError(f"{source}: row {bad[0]} has the key {keys[bad[0]]!r}; expected a name, as text")
    words = table[names["instruction"]] if names["instruction"] else [None] * len(table)
    table = table.select_columns([names["image"]]).rename_columns({names["image"]: "image"})
    table = table.add_column("key", list(keys)).add_column("instruction", [own or instruction for own in words])
    return table.select_columns(list(ITEMS)).cast(ITEMS)


def _named(items: Dataset, source: str) -> Dataset:
    seen: dict[str, str] = {}
    for key in items["key"]:
        if (name := _folder(key)) in seen:
            raise ValueError(f"{source}: items {seen[name]!r} and {key!r} would share the folder {name}; rename one.")
        seen[name] = key
    return items


def _folder(key: str, sample: int = 0, num_images: int = 1) -> str:
    """A name inside the output folder, whatever the key is."""
    return re.sub(r"[^\w-]", "_", key) + (f"-{sample:04d}" if num_images > 1 else "")


def _check(row: dict):
    if not (row["instruction"] or "").strip():
        raise BadRecord(f"{row['key']}: the instruction is empty; say what to change, or give --instruction for all.")
    try:
        return load_image(row["image"], name=row["key"]), row["instruction"]
    except ImageError as error:
        raise BadRecord(str(error)) from error


def _claim(output_dir: Path, run: dict) -> None:
    """Results of different settings do not go into one folder."""
    path = output_dir / RUN_FILE
    output_dir.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(key for key in found.keys() | run.keys() if found.get(key) != run.get(key))
        if other:
            text = ", ".join(f"{key}={found.get(key)!r} (now {run.get(key)!r})" for key in other)
            raise ValueError(f"{output_dir} holds edits made with {text}. Give another --output_dir, or remove it.")
    write_json(path, run)


def _save(result, folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    for leftover in (temporary, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    result.save(temporary)
    temporary.rename(folder)


def _rows(output_dir: Path, key: str, instruction: str | None, num_images: int) -> list[dict] | None:
    """The table's rows of a finished item; None where a sample is missing or was asked for in other words."""
    rows = []
    for sample in range(num_images):
        name = _folder(key, sample, num_images)
        try:
            result = json.loads((output_dir / name / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if result["instruction"] != instruction:
            return None
        row = {"key": key, "instruction": instruction, "sample": sample}
        row |= {kind: f"{name}/{kind}.png" for kind in ("pixel_composite", "raw_model", "clear_mask")}
        row |= {field: result[field] for field in ("clear_fraction", "passes", "tokens")}
        rows.append(row | {"seconds": sum(result["seconds"].values())})
    return rows


def _write_tables(output_dir: Path, wanted: list[tuple], num_images: int, skipped: list[str]) -> None:
    rows = [row for item in wanted for row in _rows(output_dir, *item, num_images) or ()]
    write_json(output_dir / SKIPPED_FILE, skipped)
    if not rows:
        raise BadRecord(f"none of {len(wanted)} items could be edited; {output_dir / SKIPPED_FILE} says why.")
    with replacing(output_dir / TABLE_FILE) as temporary:
        Dataset.from_list(rows).to_parquet(temporary)
