"""Thinking with generated images on the tiny Chameleon: does a second picture help, and what does CLEAR save?

`python -m experiments.thoughts_tiny --work DIR` trains every arm with two seeds through `thinkclearly train`, lets all
of them think about held-out prompts, and writes results.md and results.json beside this file. What is there already is
not done again, and a training goes on from its last checkpoint; `--only NAME` takes some arms, so that several
processes can share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.arms import kept, parse, train
from experiments.thoughts_tiny import measure
from experiments.thoughts_tiny.own_drawings import write_thoughts
from thinkclearly.data.shape_score import is_shown
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.evaluation.report import machine
from thinkclearly.files import write_json, write_text
from thinkclearly.models.finetunes import load_any
from thinkclearly.reporting.tables import markdown_table

HERE = Path(__file__).parent
SEEDS = (1, 2)
CRITIQUES, OTHERS = 2400, 800  # thoughts to learn from
BASE = "tiny_chameleon"
COMMON = {
    "method": "interleaved",
    "base_model": BASE,
    "lora_r": 0,
    "source": "thoughts",
    "eval_samples": 0,
    "per_device_train_batch_size": 16,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "max_steps": 80,
    "warmup_steps": 10,
    "drop_all": 0.1,
    "logging_steps": 10,
    "eval_strategy": "no",
    "save_steps": 40,
}
WEAK = 0.1  # the tiny codebook's rows are long: the paper's 1 outweighs the cross-entropy, see "strong"
# The gate has to be learnt from nothing.
TAUGHT_CLEAR = {"reconstruction_weight": 0, "instructions": ["CLEAR"], "clear_weight": 0.3}
TAUGHT_CLEAR |= {"learning_rate": 1e-4, "max_steps": 400, "save_steps": 100}
# One row, as it is trained. The presets' scales are for 7B models.
SETTINGS = ThoughtSettings(guidance_kind="normal", full_scale=1.0, pictures_scale=0.0, picture_top_k=0)


@dataclass(frozen=True)
class Arm:
    """One way to train, and which measurements are left out."""

    name: str
    options: dict = field(default_factory=dict)
    left_out: frozenset | set = frozenset({"clear", "mended", "matters"})


ARMS = [
    Arm("cross-entropy", {"reconstruction_weight": 0}, left_out=set()),
    Arm("reconstruction, next", {"reconstruction_weight": WEAK, "reconstruction_at": "next"}),
    Arm("reconstruction, own", {"reconstruction_weight": WEAK, "reconstruction_at": "own"}),
    Arm("reconstruction, strong", {"reconstruction_weight": 1, "reconstruction_at": "next"}),
    Arm("CLEAR", TAUGHT_CLEAR, left_out={"thinking", "matters"}),
]


def directory(work: Path, arm: Arm, seed: int) -> Path:
    return work / f"{arm.name.replace(', ', '-')}-{seed}"


def teach(work: Path, arm: Arm, seed: int) -> Path:
    """One run of `thinkclearly train`."""
    output = directory(work, arm, seed)
    thoughts = work / "thoughts"
    if not (thoughts / "thoughts.jsonl").is_file():
        write_thoughts(BASE, thoughts, SETTINGS, CRITIQUES, OTHERS)
    options = COMMON | arm.options | {"seed": seed, "output_dir": output, "prepared_dir": work / "prepared"}
    options["path"] = thoughts / "thoughts.jsonl"
    train(options)
    return output


def measure_thinking(name: str, count: int) -> dict:
    """Drawing at once, critiques and sub-goals on the same prompts."""
    model, processor = load_any(name)
    prompts, several = measure.held_out("critique", count), measure.held_out("subgoals", count)
    return {
        "at once": measure.share(measure.drawing_at_once(model, processor, prompts, SETTINGS)),
        "critique": measure.critiques(model, processor, prompts, SETTINGS)[1],
        "at once, several": measure.share(measure.drawing_at_once(model, processor, several, SETTINGS)),
        "subgoals": measure.subgoals(model, processor, several, SETTINGS),
    }


def measure_matters(name: str, count: int) -> dict:
    """What the last picture loses by another first picture or other words."""
    model, processor = load_any(name)
    prompts = measure.held_out("critique", count)
    thoughts, _ = measure.critiques(model, processor, prompts, SETTINGS)
    return measure.interventions(model, processor, prompts, SETTINGS, thoughts)


def measure_clear(name: str, count: int) -> dict:
    """Second pictures with the first as source (CLEAR) or as draft, and drawn like the first."""
    model, processor = load_any(name)
    prompts, found = measure.held_out("critique", count), {}
    ways = {"CLEAR": {}, "CLEAR, prefer edit": {"prefer": "edit"}}
    if not len(model.vocabulary):
        ways = {"first picture as draft": {}, "drawn like the first": {"second": "draw"}}
    for way, options in ways.items():
        settings = replace(SETTINGS, block=64, **options)
        found[way] = measure.second_thoughts(model, processor, prompts, settings)
    return found


def measure_mended(name: str, count: int) -> dict:
    """The same where the first picture and the words are given, with mistakes that are made up."""
    model, processor = load_any(name)
    second = {"CLEAR": "edit"} if len(model.vocabulary) else {"drawn like the first": "draw"}
    ways = {way: replace(SETTINGS, block=64, second=value) for way, value in second.items()}
    return {way: measure.mended(model, processor, count, settings) for way, settings in ways.items()}


def measure_tokenizer(count: int) -> dict:
    """The true scenes through the tokenizer: the most that any drawing reaches."""
    model, processor = load_any(BASE)
    scenes, found = [scene for _, scene in measure.held_out("critique", count)], []
    for i in range(0, count, measure.BATCH):
        squares = [scene.render(processor.image_size) for scene in scenes[i : i + measure.BATCH]]
        codes = model.token_model.encode(processor.pixel_values(squares))
        found += [is_shown(p, s) for p, s in zip(measure.to_pictures(model, codes), scenes[i:])]
    partner = scenes[1:] + scenes[:1]
    others = [is_shown(scene.render(processor.image_size), other) for scene, other in zip(scenes, partner)]
    return {"ceiling": measure.share(found), "another prompt's picture": measure.share(others)}


def percent(*shares: float) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]


def table(rows: Sequence[Sequence]) -> str:
    return markdown_table(rows[0], rows[1:])


def write_report(found: dict, arguments: argparse.Namespace) -> None:
    critique = [["%", "seed", "at once", "first", "last", "right stays right", "wrong becomes right"]]
    goals = [["%", "seed", "at once", "object by object", "as many pictures as asked"]]
    matters = [["last picture right, %", "seed"]]
    clear = [["", "seed", "second picture", "first, %", "last, %", "passes", "right patches kept, %"]]
    mended = [[*clear[0], "copied, %"]]
    clear[0] += ["right pictures kept whole, %", "copied, %"]
    for row in found["rows"]:
        name = [row["name"], row["seed"]]
        if "thinking" in row:
            one = row["thinking"]
            numbers = [one["critique"][k] for k in critique[0][3:]]
            critique.append([*name, *percent(one["at once"], *numbers)])
            goals.append(
                [*name, *percent(one["at once, several"], one["subgoals"]["last"], one["subgoals"]["all pictures"])]
            )
        if "matters" in row:
            if len(matters) == 1:
                matters[0] += list(row["matters"])
            matters.append([*name, *percent(*row["matters"].values())])
        for rows, kind in ((clear, "clear"), (mended, "mended")):
            for way, one in row.get(kind, {}).items():
                cells = [*name, way, *percent(one["first"], one["last"]), f"{one['passes']:.1f}"]
                names = ("right patches kept", "right pictures kept whole", "copied by CLEAR")
                rows.append([*cells, *percent(*(one[k] for k in names[:: 2 if kind == "mended" else 1]))])
    tokenizer = found["tokenizer"]
    text = f"""# Thinking with generated images on the tiny Chameleon

`python -m experiments.thoughts_tiny --count {arguments.count}`: {arguments.count} held-out prompts of three or
four shapes on a plain background, temperature 1 for words and codes, one row (no guidance). The
generator judges: every shape in colour, place and outline, the background, and nothing else. True scenes through the
tokenizer pass in {100 * tokenizer["ceiling"]:.1f} %, another prompt's true scene in
{100 * tokenizer["another prompt's picture"]:.1f} %. Machine: {found["machine"]}, shared with other work. Two standard
errors of a share near one half are {200 * (0.25 / arguments.count) ** 0.5:.1f} points.

The arms continue the shipped model for {COMMON["max_steps"]} steps (CLEAR: {TAUGHT_CLEAR["max_steps"]}) of
{COMMON["per_device_train_batch_size"]} thoughts: {found["thoughts"]["critiques"]} critiques of its own drawings, of
which {found["thoughts"]["wrong"]} have a mistake, with {OTHERS} critiques of made-up mistakes, {OTHERS} sub-goals and
{OTHERS} drawings at once. First pictures with a mistake are shown and not taught. Learning rates and weights of the
arms were changed three times after a look at these same prompts.

## Critique

{table(critique)}

## Sub-goals

{arguments.count} held-out prompts of two and three shapes.

{table(goals)}

## Does the thought matter?

The last picture, drawn after a first picture and words that are its own, those of the next prompt, or words of the
generator, which knows what is wrong.

{table(matters)}

## Second thoughts with CLEAR

Blocks of 64 codes; one code a pass takes 64 passes. "Right patches" of the first picture have the wanted colours
already; they are kept where the second picture has the same codes. Copying the first picture whole would take no pass,
keep 100 %, and be right as often as the first.

{table(clear)}

The same for {arguments.count} first pictures of one to three shapes with mistakes that the generator made up, and its
own words:

{table(mended)}
"""
    if missing := found["not_measured"]:
        text += f"\nNot measured: {', '.join(missing)}.\n"
    write_text(HERE / "results.md", text)
    write_json(HERE / "results.json", found)


def main() -> None:
    arguments = parse(__doc__, "outputs/thoughts_tiny", {"count": (300, "held-out prompts of each kind")})
    work, count = arguments.work, arguments.count
    found = {"machine": machine(), "rows": [], "not_measured": []}
    found["tokenizer"] = kept(work / "measured" / f"tokenizer-{count}.json", measure_tokenizer, count)
    arms = [(Arm("shipped", left_out=set()), "–", None)] + [
        (arm, seed, directory(work, arm, seed)) for arm in ARMS for seed in SEEDS
    ]
    for arm, seed, output in arms:
        label = output.name if output else "shipped"
        if arguments.only and not any(word in label for word in arguments.only):
            continue
        row = {"name": arm.name, "seed": str(seed)}
        kinds = {"thinking": measure_thinking, "matters": measure_matters}
        kinds |= {"clear": measure_clear, "mended": measure_mended}
        for kind in arm.left_out | ({"matters", "mended"} if seed == SEEDS[1] else set()):
            kinds.pop(kind, None)
        for kind, what in kinds.items():
            path = work / "measured" / f"{label}-{kind}-{count}.json"
            if arguments.so_far and not path.is_file():
                found["not_measured"].append(path.stem)
                continue
            if output and not path.is_file():
                teach(work, arm, seed)
            row[kind] = kept(path, what, str(output or BASE), count)
        found["rows"].append(row)
    found["thoughts"] = json.loads((work / "thoughts" / "counts.json").read_text())
    if not arguments.only:
        write_report(found, arguments)


if __name__ == "__main__":
    main()
