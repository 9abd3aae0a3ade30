"""Editing at scale: a folder, a JSONL file or a data set through an editor, shared out over processes and resumable.

Knows how items are read, skipped and written. Does not know how an edit is made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from thinkclearly.data.magicbrush import COLUMNS, load_table
from thinkclearly.data.sources import BadRecord, inside, pictures_in
from thinkclearly.decoding.settings import check_seed
from thinkclearly.editing.editor import Editor
from thinkclearly.files import replacing, strict, write_json
from thinkclearly.images import ImageError, load_photo

logger = logging.getLogger(__name__)

ITEMS = datasets.Features(
    {"key": datasets.Value("string"), "instruction": datasets.Value("string"), "image": datasets.Image(decode=False)}
)
RUN_FILE, TABLE_FILE, SKIPPED_FILE, ITEM_FILE = "run.json", "results.parquet", "skipped.json", "item.json"


@dataclass
class BatchReport:
    """Counts over all processes, and one message for each record that was left out."""

    items: int
    edited: int
    skipped: list[str]


def read_items(
    source: str,
    instruction: str | None = None,
    split: str = "train",
    on_bad_record: str = "error",
    output_dir: str | Path | None = None,
) -> tuple[Dataset, list[str]]:
    """Pictures to edit, with columns `key`, `instruction` and `image`, and one message for each bad line.

    Args:
        source: a folder of pictures, read without the results of earlier runs in it; a `.jsonl` file with `image` (a
            path inside the file's folder), `instruction` and, if wanted, `key` in each line; or a data set: Hub id,
            `.parquet` file, or folder of `save_to_disk`.
        instruction: of every item that has none of its own.
        split: of a data set on the Hub.
        on_bad_record: `"error"` stops at the first bad line, `"skip"` leaves it out.
        output_dir: where results will go; may lie in the folder.

    Raises:
        BadRecord: a line that is not a JSON object with a picture inside the file's folder.
        ValueError, FileNotFoundError: nothing to read, or two items of the same name.
    """
    path, skipped = Path(source), []
    if path.is_dir() and not (path / "dataset_info.json").is_file():
        rows = [(str(file.relative_to(path)), None, {"path": str(file)}) for file in _photos(path, output_dir)]
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
    so that the same call again goes on. Items whose picture or instruction is another one than before are edited
    anew. At the end `results.parquet` has one row an item.

    Args:
        items: see `read_items`.
        run: names what the results come from, e.g. `model`; kept in `run.json` with `Editor.fingerprint`. A later call
            that differs in it, or in the model and settings themselves, is refused.
        skipped: messages about what reading left out.
        on_bad_record: `"error"` stops at a bad item, `"skip"` leaves it out; `skipped.json` lists them.
        overrides: fields of `EditSettings`.

    Raises:
        BadRecord: an item without instruction or with a picture that cannot be read; the message names it.
        ValueError: `output_dir` belongs to another run; the message names what is different.
    """
    check_seed(seed)
    output_dir, state = Path(output_dir), PartialState()
    if state.is_main_process:
        claim(output_dir, run | editor.fingerprint(**overrides))
    state.wait_for_everyone()
    mine = range(state.process_index, len(items), state.num_processes)
    finished = _finished(output_dir, items, mine, num_images)
    todo, edited, bad = [i for i in mine if i not in finished], 0, []
    options = {"num_images": num_images, "seed": seed, **overrides}
    with tqdm(total=len(mine), desc="edit", unit="picture", disable=not state.is_main_process) as bar:
        bar.update(len(finished))
        for start in range(0, len(todo), batch_size):
            batch = {}
            for i in todo[start : start + batch_size]:
                try:
                    batch[i] = _read(items[i])
                except BadRecord as error:
                    if on_bad_record == "error":
                        raise
                    bad.append(str(error))
            if batch:
                _edit(editor, list(batch.values()), output_dir, options)
            finished |= batch.keys()
            edited += len(batch)
            bar.update(len(todo[start : start + batch_size]))
    state.wait_for_everyone()
    report = BatchReport(len(items), sum(gather_object([edited])), [*skipped, *gather_object(bad)])
    everything = sorted(gather_object(list(finished)))
    if state.is_main_process:
        _write_tables(output_dir, items.select(everything)["key"], len(items), num_images, report.skipped)
    state.wait_for_everyone()
    return report


def _photos(folder: Path, output_dir: str | Path | None) -> list[Path]:
    """Pictures below a folder, without those that lie in `output_dir` or in any folder of results."""
    if output_dir is not None and folder.resolve() == Path(output_dir).resolve():
        raise ValueError(f"{folder} is the input and the output_dir; give another --output_dir, inside it if you like")
    output = None if output_dir is None else Path(output_dir).resolve()

    @lru_cache
    def results(below: Path) -> bool:
        if below == folder:
            return False
        return below.resolve() == output or (below / RUN_FILE).is_file() or results(below.parent)

    found = list(map(Path, pictures_in(folder)))
    photos = [file for file in found if not results(file.parent)]
    if len(photos) < len(found):
        logger.info("%s: %d pictures are results of editing, not input", folder, len(found) - len(photos))
    if not photos:
        raise ValueError(f"{folder}: found results of editing and no other picture; give the folder of photographs")
    return photos


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


@dataclass
class _Item:
    """One picture to edit, read; `sha256` is that of its bytes."""

    key: str
    instruction: str
    photo: Image.Image
    sha256: str


def _read(row: dict) -> _Item:
    if not (row["instruction"] or "").strip():
        raise BadRecord(f"{row['key']}: the instruction is empty; say what to change, or give --instruction for all.")
    try:
        data = _bytes(row["image"])
        photo = load_photo(data, name=row["key"])
    except ImageError as error:
        raise BadRecord(str(error)) from error
    except OSError as error:
        raise BadRecord(f"{row['key']}: cannot be read ({error}). Check the path.") from error
    return _Item(row["key"], row["instruction"], photo, hashlib.sha256(data).hexdigest())


def _bytes(image: dict) -> bytes:
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def _edit(editor: Editor, batch: list[_Item], output_dir: Path, options: dict) -> None:
    """Edits a batch and puts each result in its place."""
    results = editor.edit_many([item.photo for item in batch], [item.instruction for item in batch], **options)
    each = len(results) // len(batch)
    for k, result in enumerate(results):
        item = batch[k // each]
        result.seconds = {stage: round(s / len(results), 4) for stage, s in result.seconds.items()}
        folder = output_dir / _folder(item.key, result.sample, each)
        temporary = folder.with_name(f".{folder.name}.tmp")
        for leftover in (temporary, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        result.save(temporary)
        write_json(temporary / ITEM_FILE, {"sha256": item.sha256})
        temporary.rename(folder)


def claim(output_dir: Path, run: dict) -> None:
    """Keeps what the results in a folder come from, so that those of other models and settings do not join them.

    Raises:
        ValueError: the folder holds results of another run; the message names what is different.
    """
    path, run = output_dir / RUN_FILE, strict(run)
    output_dir.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        found, now = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(run)
        other = [key for key in {**found, **now} if found.get(key) != now.get(key)]
        if "weights" not in other:  # the same model may have moved
            other = [key for key in other if key not in ("model", "base")]
        if other:
            text = ", ".join(f"{key}={found.get(key)!r} (now {now.get(key)!r})" for key in other)
            raise ValueError(f"{output_dir} holds results made with {text}. Give another --output_dir, or remove it.")
    write_json(path, run)


def _flat(run: dict) -> dict:
    """`{"settings": {"seed": 1}}` as `{"settings.seed": 1}`."""
    flat = {}
    for key, value in run.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _finished(output_dir: Path, items: Dataset, mine: range, num_images: int) -> set[int]:
    """Numbers of the items that were edited as they are now; says which were edited as they were before."""
    finished, stale = set(), []
    for i in mine:
        item = items[i]
        rows = _rows(output_dir, item["key"], num_images)
        if len(rows) < num_images:
            continue
        try:
            now = item["instruction"], hashlib.sha256(_bytes(item["image"])).hexdigest()
        except OSError:  # for `_read` to tell
            now = None
        if all((row["instruction"], row["sha256"]) == now for row in rows):
            finished.add(i)
        else:
            stale.append(item["key"])
    if stale:
        logger.info("%d items have another picture or instruction than before: %.200s", len(stale), ", ".join(stale))
    return finished


def _rows(output_dir: Path, key: str, num_images: int) -> list[dict]:
    """The table's rows of an item, one for each sample that is there."""
    rows = []
    for sample in range(num_images):
        name = _folder(key, sample, num_images)
        files = [output_dir / name / file for file in ("result.json", ITEM_FILE)]
        try:
            result, source = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        except FileNotFoundError:
            continue
        row = {"key": key, "instruction": result["instruction"], "sample": sample, "sha256": source["sha256"]}
        row |= {kind: f"{name}/{kind}.png" for kind in ("pixel_composite", "raw_model", "clear_mask")}
        row |= {field: result[field] for field in ("clear_fraction", "passes", "fed_codes")}
        rows.append(row | {"seconds": sum(result["seconds"].values())})
    return rows


def _write_tables(output_dir: Path, keys: list[str], total: int, num_images: int, skipped: list[str]) -> None:
    rows = [row for key in keys for row in _rows(output_dir, key, num_images)]
    write_json(output_dir / SKIPPED_FILE, skipped)
    if not rows:
        raise BadRecord(f"none of {total} items could be edited; {output_dir / SKIPPED_FILE} says why.")
    with replacing(output_dir / TABLE_FILE) as temporary:
        Dataset.from_list(rows).to_parquet(temporary)
