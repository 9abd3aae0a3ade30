"""What docs/thinking.md says of guidance is what is computed."""

import re
from pathlib import Path

import pytest

from thinkclearly.decoding.thought_settings import ThoughtSettings

PAGE = (Path(__file__).parents[1] / "docs" / "thinking.md").read_text(encoding="utf-8")
PICTURES = {"critique": ("critique", 0), "subgoals, object": ("subgoals", 0), "subgoals, whole": ("subgoals", 2)}
PICTURES["general"] = ("general", 0)


def rows():
    names, *lines = [
        line for line in PAGE.splitlines() if line.startswith(("| picture |", *(f"| {p} |" for p in PICTURES)))
    ]
    for line in lines:
        picture, presets, *weights = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [float(re.match(r"−?[\d.]+", cell)[0].replace("−", "-")) for cell in weights]
        told = dict(zip([cell.strip() for cell in names.strip("|").split("|")][2:], numbers))
        for preset in ("code", "paper", "repaired") if presets == "all" else presets.split(", "):
            yield *PICTURES[picture], preset, told


@pytest.mark.parametrize(("mode", "picture", "preset", "told"), list(rows()))
def test_a_table_of_weights_is_the_presets(mode, picture, preset, told):
    weights = ThoughtSettings(mode=mode, preset=preset).weights(picture)
    assert {name: weight for name, weight in told.items() if weight} == pytest.approx(weights)
