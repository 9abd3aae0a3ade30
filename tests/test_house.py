"""The house keeps its order: a family's inside stays in its folder, and rooms import only rooms above them."""

import ast
import re
from pathlib import Path

import pytest

import thinkclearly

HOUSE = Path(thinkclearly.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
FAMILIES = {"janus", "chameleon"}
INSIDE = re.compile(r"vqmodel|vq_config|generation_head|generation_embeddings|model\.model\.")
# Images open files with what colour knows; training publishes through the hub, which knows no training.
ROOMS = ["recipe", "files", "colour", "images", "instructions", "sequence", "models", "reporting", "data", "decoding"]
ROOMS += ["generation", "editing", "evaluation", "hub", "training", "commands"]


def name_of(path):
    return ".".join(("thinkclearly", *path.relative_to(HOUSE).with_suffix("").parts))


def imported(path):
    """Modules of this package that a file imports, wherever in it: `thinkclearly.room.module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("thinkclearly."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "thinkclearly":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module):
    return module.split(".")[1]


def test_nothing_outside_a_familys_folder_reaches_into_its_model():
    reached = [
        f"{path.relative_to(HOUSE)}:{number}: {line.strip()}"
        for path in FILES
        if not FAMILIES & set(path.relative_to(HOUSE).parts)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if INSIDE.search(line)
    ]
    assert not reached


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room):
    arrows = [
        f"{name_of(path)} imports {module}"
        for path in FILES
        if room_of(name_of(path)) == room
        for module in imported(path)
        if room_of(module) in ROOMS and ROOMS.index(room_of(module)) > ROOMS.index(room)
    ]
    assert not arrows
