"""Drawing and editing with one row: rewards against guidance distillation, on the tiny models.

`python -m experiments.grpo_tiny --work DIR` trains every arm with two seeds through `thinkclearly train`, measures all
of them on held-out prompts and edits, and writes results.md and results.json beside this file. What is there already
is not done again, and a training goes on from its last checkpoint; `--only NAME` takes some arms, so that several
processes can share the work.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from transformers.trainer import TRAINER_STATE_NAME

from experiments.arms import kept, parse, train
from thinkclearly.data.options import DataArguments
from thinkclearly.data.pairs import shape_pairs
from thinkclearly.data.sources import shapes
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.benchmarks.shapes_pairs import measure_pairs
from thinkclearly.evaluation.edits import evaluate_rows
from thinkclearly.evaluation.report import machine
from thinkclearly.files import write_json, write_text
from thinkclearly.models.finetunes import TINY_CLEAR, load_any
from thinkclearly.reporting.tables import markdown_table

logger = logging.getLogger("grpo_tiny")

HERE = Path(__file__).parent
SEEDS = (1, 2)
STEPS = 40
HELD_OUT = 600  # seed of the pairs that are measured
COMMON = {
    "base_model": "tiny",
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "source": "shapes",
    "limit": 600,
    "eval_samples": 24,
    "per_device_eval_batch_size": 24,
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_steps": 20,
}
GRPO = {"method": "grpo", "per_device_train_batch_size": 4, "num_generations": 7, "beta": 0.01}
DRAW = {"pair_shapes": 1}
NO_TRUTH = {"truth_steps": 0, "truth_shares": 0}
# Of 40 steps the original's schedule would show ground truth in all.
TRUTH = {"truth_steps": [0, STEPS], "truth_shares": [1, 0]}
EDIT = {"task": "edit", "adapter": TINY_CLEAR, "temperature": 1}


@dataclass(frozen=True)
class Arm:
    """One way to train; `edits` says which of the two tables it stands in."""

    name: str
    options: dict = field(default_factory=dict)
    edits: bool = False
    seeds: tuple[int, ...] = SEEDS


ARMS = [
    Arm("Pair-GRPO, unguided", GRPO | DRAW | NO_TRUTH | {"cfg_weight": 1}),
    Arm("GRPO, a group a prompt", GRPO | DRAW | NO_TRUTH | {"cfg_weight": 1, "pair_groups": False}),
    Arm("Pair-GRPO with ground truth", GRPO | DRAW | TRUTH | {"cfg_weight": 1}),
    Arm("Pair-GRPO, guided", GRPO | DRAW | NO_TRUTH | {"cfg_weight": 2}, seeds=SEEDS[:1]),
    Arm(
        "guidance distillation",
        DRAW | {"method": "distill", "per_device_train_batch_size": 8, "num_generations": 4, "cfg_weight": 2},
    ),
    Arm(
        "GRPO on edits",
        GRPO | EDIT | {"reward_funcs": "shape_edits", "cfg_weight": 1, "learning_rate": 3e-4},
        edits=True,
    ),
    Arm(
        "guidance distillation",
        EDIT | {"method": "distill", "per_device_train_batch_size": 8, "num_generations": 4, "cfg_weight": 2},
        edits=True,
        seeds=SEEDS[:1],
    ),
]


def directory(work: Path, arm: Arm, seed: int) -> Path:
    kind = "edits" if arm.edits else "draw"
    return work / f"{kind}-{arm.name.replace(' ', '-').replace(',', '')}-{seed}"


def teach(work: Path, arm: Arm, seed: int) -> Path:
    """One run of `thinkclearly train`."""
    output = directory(work, arm, seed)
    options = COMMON | arm.options | {"seed": seed, "output_dir": output, "prepared_dir": work / "prepared"}
    train(options)
    return output


def measure_drawing(name: str, pairs: int) -> dict:
    """Guided and unguided: share of pictures that show their scene, their diversity, CPU seconds a picture."""
    model, processor = load_any(name)
    rows, found = shape_pairs(pairs, "test", seed=HELD_OUT, shapes=1), {}
    for weight in (1.0, 2.0):
        started = time.process_time()
        table = measure_pairs(model, processor, rows, DecodeSettings(cfg_weight=weight), num_samples=2)
        shown = table["arithmetic"]["model"]
        found[f"w={weight:g}"] = {
            "shown": shown["Average"],
            "kinds": {
                kind: share for kind, share in shown.items() if kind not in ("Average", "diversity", "pictures")
            },
            "geometric": table["geometric"]["model"]["Average"],
            "diversity": shown["diversity"],
            "cpu_seconds": (time.process_time() - started) / shown["pictures"],
            "partner": table["arithmetic"]["partner"]["Average"],
            "tokenizer": table["arithmetic"]["tokenizer"]["Average"],
        }
    return found


def measure_edits(name: str, count: int) -> dict:
    """Greedy, with guidance and with one row: edits done, and pixels outside that are the source's."""
    editor, found = Editor(*load_any(name)), {}
    data = DataArguments(eval_samples=count)
    rows = shapes(count, size=data.shapes_size, seed=data.split_seed + 1, split="test")
    for weight in (1.0, 2.0):
        editor.settings.cfg_weight, editor.settings.cfg_weight2, editor.settings.temperature = weight, 0.0, 0.0
        started = time.process_time()
        held_out = evaluate_rows(editor, rows, data, 25)
        composite = held_out.pictures["pixel_composite"]
        found[f"w={weight:g}"] = {
            "done": held_out.done["pixel_composite"],
            "exact_outside": composite["exact_outside"],
            "psnr_outside": composite["psnr_pooled_outside"],
            "copy_source": held_out.done["copy_source"],
            "copy_matching_tokens": held_out.done["copy_matching_tokens"],
            "cpu_seconds": (time.process_time() - started) / count,
        }
    return found


def seconds_by_stage(output: Path) -> dict[str, float]:
    """Median seconds of a step's stages: other work on the machine, and pauses, make some steps long."""
    logs = [log for log in json.loads((output / TRAINER_STATE_NAME).read_text())["log_history"] if "loss" in log]
    names = {name for log in logs for name in log if name.startswith("seconds/")}
    return {name.split("/")[1]: median(log.get(name, 0) for log in logs) for name in sorted(names)}


def write_report(found: dict, arguments: argparse.Namespace) -> None:
    drawing = [["", "seed", "shown, one row", "shown, w = 2", "all four, one row", "all four, w = 2", "spread"]]
    edits = [["", "seed", "done, one row", "done, w = 2", "exact outside, one row", "exact outside, w = 2"]]
    for row in found["rows"]:
        one, two = row["measured"]["w=1"], row["measured"]["w=2"]
        names = ("done", "exact_outside") if row["edits"] else ("shown", "geometric")
        cells = [row["name"], str(row["seed"]), *(f"{each[name]:.1%}" for name in names for each in (one, two))]
        if row["edits"]:
            edits.append(cells)
        else:
            drawing.append([*cells, f"{one['diversity']:.1f} / {two['diversity']:.1f}"])
    before = {row["edits"]: row["measured"] for row in found["rows"] if row["seed"] == "–"}
    one, two, of_edits = before[False]["w=1"], before[False]["w=2"], before[True]["w=1"]
    stages = sorted({stage for seconds in found["stages"].values() for stage in seconds})
    times = [["seconds a step", *stages]]
    times += [[name, *(f"{each.get(stage, 0):.2f}" for stage in stages)] for name, each in found["stages"].items()]
    text = f"""# One row: rewards and guidance distillation on the tiny models

`python -m experiments.grpo_tiny --pairs {arguments.pairs} --edits {arguments.edits}`: {STEPS} steps
an arm. Machine: {found["machine"]}, shared with other work.

## Drawing

{arguments.pairs} held-out pairs of captions ({2 * arguments.pairs} prompts) of one shape on a plain background (of
`count` pairs one side has two), two samples each at temperature 1. The generator judges: every shape in colour, place
and outline, the background, and nothing else. The true picture of the partner would pass in {one["partner"]:.1%}, the
prompt's own true picture through the tokenizer in {one["tokenizer"]:.1%}. "All four" is PairComp's geometric mean: the
share of pairs of which all four pictures show their scene. "Spread" is the mean difference of two samples of a prompt,
levels of 255.

{markdown_table(drawing[0], drawing[1:])}

Before training, a picture with w = 2 takes {two["cpu_seconds"] / one["cpu_seconds"]:.2f} times the CPU time of one
with one row, judging included.

## Edits

{arguments.edits} held-out edits of the built-in shapes over photographs that training never drew on, greedy. Copying
the source is done in {of_edits["copy_source"]:.1%}, copying where the codes match in
{of_edits["copy_matching_tokens"]:.1%}.

{markdown_table(edits[0], edits[1:])}

## Where a step's time goes

Seed {SEEDS[0]}, median of {STEPS} steps, one thread; "reference" of distillation is the teacher.

{markdown_table(times[0], times[1:])}
"""
    if missing := found["not_measured"]:
        text += f"\nNot measured: {', '.join(missing)}.\n"
    write_text(HERE / "results.md", text)
    write_json(HERE / "results.json", found)


def main() -> None:
    counts = {"pairs": (150, "held-out pairs of captions"), "edits": (300, "held-out edits")}
    arguments = parse(__doc__, "outputs/grpo_tiny", counts)
    work = arguments.work
    found = {"machine": machine(), "rows": [], "stages": {}, "not_measured": []}
    for edits, name in ((False, "tiny"), (True, str(TINY_CLEAR))):
        if not any(arm.edits == edits for arm in ARMS):
            continue
        measure, count = (measure_edits, arguments.edits) if edits else (measure_drawing, arguments.pairs)
        if not arguments.only or "base" in arguments.only:
            what = kept(work / "measured" / f"base-{'edits' if edits else 'draw'}.json", measure, name, count)
            found["rows"].append({"name": "before", "seed": "–", "edits": edits, "measured": what})
        for arm in [arm for arm in ARMS if arm.edits == edits]:
            for seed in arm.seeds:
                output = directory(work, arm, seed)
                if arguments.only and not any(word in output.name for word in arguments.only):
                    continue
                if arguments.so_far and not (work / "measured" / f"{output.name}.json").is_file():
                    found["not_measured"].append(output.name)
                    continue
                output = output if arguments.so_far else teach(work, arm, seed)
                what = kept(work / "measured" / f"{output.name}.json", measure, str(output), count)
                found["rows"].append({"name": arm.name, "seed": seed, "edits": edits, "measured": what})
                if seed == SEEDS[0]:
                    found["stages"][f"{arm.name} ({'edits' if edits else 'drawing'})"] = seconds_by_stage(output)
    if not arguments.only:
        write_report(found, arguments)


if __name__ == "__main__":
    main()
