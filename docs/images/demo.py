"""Makes demo.png from outputs/demo, which `make demo` writes: the first photograph and the first held-out edits."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from thinkclearly.evaluation.pictures import heat_map, red_overlay, sheet

ROOT = Path("outputs/demo")
rows = []
for folder in [ROOT / "photographs" / "0000", *(ROOT / "edits" / f"{i:04d}" for i in range(5))]:
    pictures = {
        name: Image.open(folder / f"{name}.png").convert("RGB")
        for name in ("input_image", "raw_model", "pixel_composite", "clear_mask")
    }
    source, raw, composite = (pictures[name] for name in ("input_image", "raw_model", "pixel_composite"))
    edited = np.asarray(pictures["clear_mask"].convert("L")) < 128
    instruction = json.loads((folder / "result.json").read_text())["instruction"]
    rows.append(
        [
            (source, instruction),
            (raw, "raw decode"),
            (composite, "composite"),
            (red_overlay(source, edited), "edited patches"),
            (heat_map(raw, source), "raw − source"),
            (heat_map(composite, source), "composite − source"),
        ]
    )
sheet(rows, cell=150).quantize(128).save(Path(__file__).with_suffix(".png"), optimize=True)
