"""What is trained and what is measured, in the order of importance, and how it is shared among processes.

Importing this loads nothing heavy: a new process must set its number of threads before torch is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

OUTPUT = Path("outputs/stability")
SEEDS = (42, 43, 44)
EDITS, SWEEP = 504, 168  # held-out edits: of each seed in the main table, and of all seeds together elsewhere
WEIGHTS, GUIDANCE, TEMPERATURES = (0.1, 0.3, 1.0, 3.0), (1.0, 3.0, 5.0, 7.0), (0.5, 0.8, 1.0)
BIASES = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)
ABLATIONS = ("label mask", "no dropout", "gate loss", "CLEAR in all rows", "tuned weight", "rank 8")

TRAINED = [
    *[("default", seed) for seed in SEEDS],
    *[("original", seed) for seed in SEEDS],
    *[("label tokens", seed) for seed in SEEDS],
    *[(f"weight {w:g}", seed) for seed in SEEDS[:2] for w in WEIGHTS if w != 0.3],
    *[(name, SEEDS[0]) for name in ABLATIONS],
]

# How the original edits: joint guidance with its defaults (Janus-4o's formula, w = w2 = 5, sampling at temperature 1).
ORIGINAL = {"guidance": "joint", "cfg_weight": 5.0, "cfg_weight2": 5.0, "temperature": 1.0}


@dataclass(frozen=True)
class Point:
    """A trained variant, the settings it edits with, and which seeds share the edits.

    Args:
        group: the table that it belongs to.
        settings: differences to what the checkpoint edits with.
        whole: every seed edits `EDITS` pictures; else the seeds share `SWEEP` of them.
    """

    group: str
    variant: str
    settings: dict = field(default_factory=dict)
    seeds: tuple = SEEDS
    whole: bool = False

    def parts(self) -> list[tuple[int, int, int]]:
        """(seed, first edit, number of edits)."""
        if self.whole:
            return [(seed, 0, EDITS) for seed in self.seeds]
        share = SWEEP // len(self.seeds)
        return [(seed, i * share, share) for i, seed in enumerate(self.seeds)]


def variant(weight: float) -> str:
    return "default" if weight == 0.3 else f"weight {weight:g}"


def points() -> list[Point]:
    joint, others = {"guidance": "joint"}, [w for w in WEIGHTS if w != 0.3]
    found = [
        Point("main", "default", whole=True),
        Point("main", "default", {"calibrated": False}, whole=True),
        Point("main", "original", ORIGINAL, whole=True),
        Point("main", "label tokens", whole=True),
        Point("main", "default", ORIGINAL, SEEDS[:1], whole=True),
        *[Point("weight", variant(w), seeds=SEEDS[:2]) for w in others],
        *[Point("guidance", "default", {"cfg_weight": g}) for g in GUIDANCE],
        *[Point("bias", "default", {"clear_bias": b}) for b in BIASES],
        *[Point("bias", "original", {**ORIGINAL, "clear_bias": b}) for b in BIASES if abs(b) > 1],
        *[Point("guidance", "original", {**ORIGINAL, "cfg_weight": g}) for g in GUIDANCE if g != 5],
        *[Point("guidance", "default", {**ORIGINAL, "cfg_weight": g}) for g in GUIDANCE if g != 5],
        *[Point("prefer", "default", {"prefer": p}) for p in ("edit", "exact")],
        *[Point("ablation", name, seeds=SEEDS[:1], whole=True) for name in ABLATIONS],
        *[Point("temperature", "default", {"temperature": t}) for t in TEMPERATURES],
        *[Point("grid", variant(w), {"cfg_weight": g}, SEEDS[:2]) for w in others for g in GUIDANCE],
        *[Point("grid", variant(w), ORIGINAL, SEEDS[:2]) for w in others],
    ]
    draw = random.Random(0)
    for _ in range(6):  # of the whole grid
        settings = {"cfg_weight": draw.choice(GUIDANCE), "clear_bias": draw.choice((0.0, *BIASES))}
        settings |= {"temperature": draw.choice(TEMPERATURES)} | draw.choice(({}, joint, {"cfg_weight2": 5.0}))
        found.append(Point("sample", variant(draw.choice(WEIGHTS)), settings, SEEDS[:2]))
    return found


def path(point: Point, seed: int, first: int, count: int) -> Path:
    key = json.dumps([point.variant, sorted(point.settings.items()), seed, first, count])
    return OUTPUT / "points" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def train(name: str, seed: int) -> str:
    from benchmarks.stability.train import train as run

    run(OUTPUT, name, seed)
    return f"trained {name}, seed {seed}"


def measure(point: Point, seed: int, first: int, count: int) -> str:
    from benchmarks.stability.measure import measure as run
    from thinkclearly.files import write_json

    file = path(point, seed, first, count)
    if not file.is_file():
        row = run(OUTPUT, point.variant, seed, point.settings, first, count)
        write_json(file, {**asdict(point), "seed": seed, "first": first, "edits": count, "row": row})
    return f"measured {point.variant} {point.settings}, seed {seed}"


def one_thread():
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported


def in_processes(workers: int, job, tasks: list[tuple]) -> None:
    """Every task in a process of one thread: on a small model that is faster than one process of all threads."""
    # Not forked: a thread of torch's would be missing in the child.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=one_thread) as pool:
        for done in as_completed([pool.submit(job, *task) for task in tasks]):
            sys.stderr.write(done.result() + "\n")
