"""Makes thinking.png: critiques by the tiny Chameleon whose second picture is an edit of the first.

Of `COUNT` held-out prompts the first ones that end in each of three ways are shown, not chosen by hand. Run from the
root of the repository with a model that the experiment trained:
`python docs/images/thinking.py outputs/thoughts_tiny/CLEAR-1`.
"""

import sys
import textwrap
from pathlib import Path

import numpy as np

from experiments.thoughts_tiny.__main__ import SETTINGS
from experiments.thoughts_tiny.measure import SEED, held_out
from thinkclearly.data.shape_score import is_shown
from thinkclearly.generation.think import think, whole
from thinkclearly.models.finetunes import load_any
from thinkclearly.reporting.pictures import heat_map, red_overlay, sheet

COUNT, CELL = 60, 256
WAYS = {(False, True): ("wrong, then right", 2), (True, True): ("right, and stays", 1), (False, False): ("wrong", 1)}
model, processor = load_any(sys.argv[1])
prompts = held_out("critique", COUNT)
samples = [(SEED, k) for k in range(COUNT)]
stream = think(model, processor, [prompt for prompt, _ in prompts], SETTINGS, samples=samples)
thoughts = dict(whole(stream))
rows = []
for way, (name, count) in WAYS.items():
    found = [
        k
        for k, (_, scene) in enumerate(prompts)
        if len(thoughts[k].pictures) > 1
        and (is_shown(thoughts[k].first, scene), is_shown(thoughts[k].last, scene)) == way
    ]
    for k in found[:count]:
        first, last = thoughts[k].pictures[0], thoughts[k].pictures[-1]
        painted = np.kron(~last.clear, np.ones((first.image.width // len(last.clear),) * 2, bool))
        large = [picture.resize((CELL, CELL), 0) for picture in (first.image, last.image)]
        marked = red_overlay(first.image, painted).resize((CELL, CELL), 0)
        rows.append(
            [
                (large[0], textwrap.shorten(prompts[k][0], 120)),
                (marked, f"“{thoughts[k].text}” (red: painted anew, {last.passes} passes of 64)"),
                (large[1], f"second picture: {name}, {len(found)} of {COUNT}"),
                (heat_map(*large), "difference; black is bit-identical"),
            ]
        )
sheet(rows, CELL).save(Path(__file__).with_suffix(".png"), optimize=True)
