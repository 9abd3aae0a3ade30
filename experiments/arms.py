"""What experiments share: a training as somebody would start it, and measurements that are not made twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from thinkclearly.commands.train import main
from thinkclearly.files import write_json


def train(options: dict) -> None:
    """`thinkclearly train` with these options; it goes on where it was stopped."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    main(words)


def kept(path: Path, measure: Callable[..., dict], *arguments) -> dict:
    """What `measure` gives, kept in a file."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, measure(*arguments))
    return json.loads(path.read_text())
