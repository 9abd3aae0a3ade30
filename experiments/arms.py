"""What experiments share: a training as somebody would start it, and measurements that are not made twice."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from thinkclearly.commands.train import main
from thinkclearly.files import write_json


def parse(description: str, work: str, counts: dict[str, tuple[int, str]]) -> argparse.Namespace:
    """The command line that every experiment has, with `counts` of what is measured: name → default and help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(work))
    for name, (default, help_line) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=help_line)
    parser.add_argument("--only", nargs="*", default=[], help="arms whose folder's name holds one of these; no report")
    parser.add_argument("--so_far", action="store_true", help="report what is measured; train and measure nothing")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    return parser.parse_args()


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
