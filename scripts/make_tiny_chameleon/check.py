"""What a tiny Chameleon can do: held-out prompts drawn right, at once and by thinking, judged by the generator.

Knows the model by its folder only.
"""

from pathlib import Path

import numpy as np
from data import IMAGE_SIZE

from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import Scene
from thinkclearly.data.thoughts import NOTHING_WRONG, thought_rows
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.generation.draw import to_pictures
from thinkclearly.generation.think import Text, Thought, think, whole
from thinkclearly.models.finetunes import load_any

SEED, BATCH = 77, 30
PLAIN = {"guidance_kind": "normal", "pictures_scale": 0.0, "second": "draw", "temperature": 0.0, "picture_top_k": 0}
PLAIN["max_length"] = 1024  # tokens: what the model has room for
GREEDY, SAMPLED = {"picture_temperature": 0.0}, {"picture_temperature": 1.0}
WAYS = {
    "at once, greedy": {"mode": "general", "full_scale": 1.0, **GREEDY},
    "at once, greedy, guidance 2": {"mode": "general", "full_scale": 2.0, **GREEDY},
    "at once, sampled": {"mode": "general", "full_scale": 1.0, **SAMPLED},
    "at once, sampled, guidance 2": {"mode": "general", "full_scale": 2.0, **SAMPLED},
    "critique, greedy": {"mode": "critique", "full_scale": 1.0, **GREEDY},
    "critique, sampled, guidance 2": {"mode": "critique", "full_scale": 2.0, **SAMPLED},
    "sub-goals, greedy": {"mode": "subgoals", "full_scale": 1.0, **GREEDY},
}


def check(directory: Path, count: int = 150) -> None:
    """Prints a line for the tokenizer's ceiling and one for each of `WAYS`."""
    model, processor = load_any(str(directory))
    for mode in ("general", "subgoals"):
        rows = thought_rows(mode, count, "test", SEED, IMAGE_SIZE)
        scenes = [Scene.from_json(row["scene"]) for row in rows]
        squares = [scene.render(IMAGE_SIZE) for scene in scenes]
        codes = model.token_model.encode(processor.pixel_values(squares))
        report(
            f"true pictures of {mode}", [is_shown(*pair) for pair in zip(to_pictures(model, codes), scenes)], scenes
        )
        for name, options in WAYS.items():
            if (options["mode"] == "subgoals") == (mode == "subgoals"):
                settings = ThoughtSettings(**PLAIN, **options)
                thoughts = thoughts_of(model, processor, [row["prompt"] for row in rows], settings)
                report(name, [bool(t.pictures) and is_shown(t.last, s) for t, s in zip(thoughts, scenes)], scenes)
                if mode == "general" and options["mode"] == "critique":
                    critique_report(thoughts, scenes)


def thoughts_of(model, processor, prompts: list[str], settings: ThoughtSettings) -> list[Thought]:
    thoughts = {}
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        samples = [(SEED, first + k) for k in range(len(batch))]
        for k, thought in whole(think(model, processor, batch, settings, samples=samples)):
            thoughts[first + k] = thought
    return [thoughts[number] for number in range(len(prompts))]


def critique_report(thoughts: list[Thought], scenes: list[Scene]) -> None:
    """What the first picture was, and whether the words say so."""
    first = np.array([bool(t.pictures) and is_shown(t.first, s) for t, s in zip(thoughts, scenes)])
    praised = ["".join(p.text for p in t.parts if isinstance(p, Text)) in NOTHING_WRONG for t in thoughts]
    report("  its first picture", first, scenes)
    for name, rows in (("right", first), ("wrong", ~first)):
        if rows.any():
            print(f"  says that nothing is wrong with a {name} one: {np.mean(praised, where=rows):.0%}")  # noqa: T201


def report(name: str, done, scenes: list[Scene]) -> None:
    numbers = sorted({len(scene.shapes) for scene in scenes})
    shares = [np.mean([d for d, s in zip(done, scenes) if len(s.shapes) == n]) for n in numbers]
    parts = ", ".join(f"{n}: {share:.0%}" for n, share in zip(numbers, shares))
    print(f"{name:32} right {np.mean(done):.0%} (shapes {parts})", flush=True)  # noqa: T201
