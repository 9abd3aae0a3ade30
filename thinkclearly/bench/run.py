"""The job `thinkclearly bench`: which models and cases, the targets, and the two files that are written."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import is_bitsandbytes_available

from thinkclearly import load_editor
from thinkclearly.bench import cases
from thinkclearly.bench.measure import copy_bandwidth, interleaved, summary, weight_bytes
from thinkclearly.bench.scripted import SHARES, SIZES, SMALL_TOWERS, random_model
from thinkclearly.bench.tables import render
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.data.sources import OFFSETS
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.report import machine
from thinkclearly.files import write_json, write_text
from thinkclearly.models.finetunes import TINY_CLEAR
from thinkclearly.models.quantization import quantization
from thinkclearly.recipe import DTYPES, RecipeParser, check_choice, option

logger = logging.getLogger(__name__)

LEVEL = 4.0  # of `cases.LEVELS`, where random codes are hardest to guess
PUBLISHED = 318  # of 576 passes, by Jacobi decoding with long blocks (SJD in table of SCD, arXiv 2510.24211)
SEED = 12  # of the built-in edits
TITLES = {
    "tiny": "The tiny model, trained, real edits",
    "mid": "A model of mid size, random weights, scripted mask",
    "1b": "Janus-Pro-1B's shape, random weights, scripted mask",
    "7b": "Janus-Pro-7B's shape, random weights, scripted mask",
}


@dataclass
class BenchArguments:
    """What is measured."""

    models: list[str] = option(
        ["tiny", "mid"], "tiny (trained, ships along), mid (random, fits a CPU), 1b and 7b (random, for a GPU)."
    )
    rounds: int = option(3, "Rounds that count; every decoder runs once in each.")
    edits: int = option(32, "tiny: edits of a round. Times, passes and shares are all of these same edits.")
    seeds: int = option(50, "Masks for which passes are counted; 0 leaves the counting out.")
    dtype: str = option("float32", "float32, bfloat16 or float16; of the random models.")
    device: str | None = option(None, "cpu, cuda, cuda:1; the best there is if not given.")
    output_dir: str = option("outputs/bench", "Where decoding.json and decoding.md go.")

    def __post_init__(self):
        for name in self.models:
            check_choice("models", name, tuple(TITLES))
        check_choice("dtype", self.dtype, DTYPES)
        for name, least in (("rounds", 1), ("edits", 1), ("seeds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; expected {least} or more")


def main(argv: list[str] | None = None) -> None:
    (arguments,) = RecipeParser(BenchArguments, prog="thinkclearly bench").parse(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    results = {"setup": _setup(arguments), "targets": [], "models": {}, "passes": []}
    with tqdm(desc="bench", unit="run") as bar:
        for name in arguments.models:
            bar.set_description(name)
            measured = tiny_case if name == "tiny" else random_case
            results["models"][name] = measured(name, arguments, device, bar.update)
        if arguments.seeds:
            bar.set_description("passes")
            results["passes"] = cases.count_passes(arguments.seeds, bar.update)
    results["targets"] = targets(results)
    output = Path(arguments.output_dir)
    write_json(output / "decoding.json", results)
    write_text(output / "decoding.md", render(results))
    logger.info("%s: decoding.md, decoding.json", output)


def _setup(arguments: BenchArguments) -> dict:
    flags = " ".join(f"--{name} {getattr(arguments, name)}" for name in ("rounds", "edits", "seeds", "dtype"))
    return {
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": arguments.dtype,
        "command": f"thinkclearly bench --models {' '.join(arguments.models)} {flags}",
    }


def tiny_case(name: str, arguments: BenchArguments, device: torch.device, tick: Callable[[], None]) -> dict:
    """The shipped fine-tune on held-out edits over photographs that training never saw."""
    editor = load_editor(str(TINY_CLEAR), device=device)
    scenes = [random_edit(SEED, OFFSETS["test"] + i, packaged_photos("test")) for i in range(arguments.edits)]
    edits = [(scene.render(editor.processor.image_size)[0], scene.instruction) for scene in scenes]
    prompts = [scene.before.caption() for scene in scenes[:4]]
    runs = interleaved(cases.edit_rows(editor, edits), arguments.rounds, tick)
    drawn = interleaved(cases.draw_rows(editor, prompts), arguments.rounds, tick)
    batches = interleaved(cases.batch_rows(editor, edits, _powers(len(edits))), arguments.rounds, tick)
    accepted = cases.acceptance(editor, edits)
    other = {"float32": editor, "bfloat16": load_editor(str(TINY_CLEAR), device=device, dtype=torch.bfloat16)}
    if is_bitsandbytes_available():
        for bits in (8, 4):
            config = quantization(bits, torch.float32)
            other[f"{bits} bits"] = load_editor(str(TINY_CLEAR), device=device, quantization_config=config)
    rows = {name: cases.edit_rows(each, edits)[cases.ADAPTIVE] for name, each in other.items()}
    precise = summary(interleaved(rows, arguments.rounds, tick), "float32")
    changed = cases.precisions(other, edits)
    return {
        "title": f"{TITLES[name]} ({editor.processor.num_image_tokens} tokens)",
        "scripted": False,
        "tokens": editor.processor.num_image_tokens,
        "edits": summary(runs, cases.REFERENCE),
        "equal_rows": summary(runs, cases.EQUAL_ROWS),
        "draw": summary(drawn, cases.REFERENCE),
        "acceptance": accepted,
        "batches": summary(batches, "1"),
        "precisions": {name: precise[name] | changed[name] for name in other},
        "profile": cases.where_time_goes(editor, edits[0]),
    }


def random_case(
    name: str,
    arguments: BenchArguments,
    device: torch.device,
    tick: Callable[[], None],
    grids: tuple[int, ...] = (8, 16, 24),
) -> dict:
    """A model of random weights at the last of `grids`; the others for the growth with the number of tokens."""
    options = {"scale": LEVEL, "dtype": getattr(torch, arguments.dtype), "device": device}
    options["towers"] = SMALL_TOWERS if name == "mid" else ({}, {})
    growth = {}
    for grid in grids:
        model, processor = random_model(SIZES[name], grid=grid, **options)
        editor = Editor(model, processor)
        noise = np.random.default_rng(0).integers(0, 256, (16 * grid, 16 * grid, 3), dtype=np.uint8)
        edit = (Image.fromarray(noise), "Make the scarf blue.")
        shares = SHARES if grid == grids[-1] else (0.15,)
        rows = cases.scripted_rows(editor, edit, shares)
        # What the first grid has warmed up stays warm; a round of the last one takes long.
        runs = interleaved(rows, arguments.rounds, tick, warm_up=grid == grids[0])
        growth[str(grid**2)] = summary(runs, cases.REFERENCE)
    drawn = interleaved(cases.draw_rows(editor, ["a red circle"]), arguments.rounds, tick, warm_up=False)
    drawn = summary(drawn, cases.REFERENCE)
    cases.script_edit(editor, edit[1], 0.15)
    family = model.token_model
    size = weight_bytes(*(family.parts()[name] for name in family.learning_parts))
    bandwidth = copy_bandwidth(device)
    limit = {"bytes": size, "bandwidth": bandwidth, "seconds": size / bandwidth}
    ours = f"{cases.ADAPTIVE}, 15% changed"
    return {
        "title": f"{TITLES[name]} ({grids[-1] ** 2} tokens)",
        "scripted": True,
        "tokens": grids[-1] ** 2,
        "edits": growth[str(grids[-1] ** 2)],
        "draw": drawn,
        "limit": limit | {"pass": drawn[cases.SEQUENTIAL]["decode"] / grids[-1] ** 2},
        "grids": {
            tokens: {cases.REFERENCE: rows[cases.REFERENCE], ours: rows[ours]} for tokens, rows in growth.items()
        },
        "profile": cases.where_time_goes(editor, edit),
    }


def _powers(most: int) -> list[int]:
    """1, 2, 4, … up to `most`, 32 at the largest."""
    return [2**k for k in range(int(math.log2(min(most, 32))) + 1)]


def targets(results: Mapping) -> list[dict]:
    """The targets that the measured cases speak of, met or not."""
    found = []

    def add(what: str, target: str, value: str, met: bool) -> None:
        found.append({"what": what, "target": target, "found": value, "met": met})

    long = [entry for entry in results["passes"] if entry["block"]]
    level = min(long, key=lambda entry: abs(entry["draw"] - PUBLISHED))["level"] if long else None
    for entry in results["passes"]:
        for share, most in (("15%", 60), ("5%", 25)) if entry["level"] == level else ():
            passes = mean(entry["shares"][share])
            block = f"block {entry['block']}" if entry["block"] else "adaptive block"
            add(f"passes of 576, {share} changed, {block}", f"≤ {most}", f"{passes:.1f}", passes <= most)
    if results["passes"]:
        most = max(p for entry in results["passes"] for passes in entry["shares"].values() for p in passes)
        add("passes of 576, most of all masks, levels and blocks", "≤ 576", str(most), most <= 576)
    for name, case in results["models"].items():
        drawn = case["draw"][cases.ADAPTIVE]["decode_ratio"][0]
        if name == "tiny":
            for rows, against in (("edits", cases.REFERENCE), ("equal_rows", cases.EQUAL_ROWS)):
                ours = case[rows][cases.ADAPTIVE]
                for what, key in (("decoding", "decode_ratio"), ("whole edit", "seconds_ratio")):
                    add(f"tiny: {what}, × {against}", "≥ 4 ×", f"{ours[key][0]:.2f} ×", ours[key][0] >= 4)
            add("tiny: text-to-image", "≥ 1.5 ×", f"{drawn:.2f} ×", drawn >= 1.5)
        elif name == "7b":
            whole = case["edits"][f"{cases.ADAPTIVE}, 15% changed"]["seconds_ratio"][0]
            add("7b: whole edit, 15% changed", "≥ 10 ×", f"{whole:.2f} ×", whole >= 10)
            share = case["limit"]["pass"] / case["limit"]["seconds"]
            add("7b: one by one against reading the weights", "≤ 1.3 ×", f"{share:.2f} ×", share <= 1.3)
    return found
