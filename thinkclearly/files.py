"""Files that are whole or not there: written beside their place under another name, then renamed.

Knows nothing of what is in them.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

A_DAY = 24 * 60 * 60  # seconds
BUILT_IN = ("tiny", "tiny_chameleon")  # names of models that ship with this package


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, which becomes `path` when the block ends; its folder is made.

    Where the block raises, what was written goes and `path` stays as it was. Threads, processes and machines that
    write the same file at once do not meet: the last one counts.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends. Where `path` is there by then, it stays.

    So of two processes that write the same folder at once, the first one counts, and the other finds its work.
    """
    path = Path(path)
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > A_DAY:
            shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_in(directory: str | Path) -> Iterator[Path]:
    """An empty folder to write files in. They replace those of the same name in `directory` when the block ends.

    For code that writes in place. A hard link to an old file keeps the old content, and where the block raises,
    `directory` stays as it was. One process at a time; what a killed one left is removed.
    """
    directory = Path(directory)
    temporary = directory / ".saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [path for path in temporary.rglob("*") if path.is_file()]:
            target = directory / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    """Writes `content` as strict JSON; see `strict`."""
    write_text(path, json.dumps(strict(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def strict(content):
    """`content` with infinities and NaN, which JSON has not, as "inf", "-inf" and "nan": `float` reads them."""
    if isinstance(content, dict):
        return {key: strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def is_local(name: str) -> bool:
    """Whether a model or data set is a file or folder of this machine, rather than a Hub id or built in."""
    return name not in BUILT_IN and (Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists())
