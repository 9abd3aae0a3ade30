"""The demo of thinking: a small Chameleon learns to think about shapes, thinks about held-out prompts, and is judged.

Knows which ways to think are compared and how the page reads. Does not know how a thought comes about.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import Scene
from thinkclearly.data.thought_files import Prompt, read_decoded
from thinkclearly.data.thoughts import thought_rows
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.thoughts import THOUGHTS_FILE, think_prompts
from thinkclearly.evaluation.report import machine, page, table
from thinkclearly.evaluation.thought_pages import STYLE, card, write_pages
from thinkclearly.files import write_json, write_text
from thinkclearly.generation.draw import to_pictures
from thinkclearly.images import load_image
from thinkclearly.models.finetunes import load_any
from thinkclearly.training.options import Options
from thinkclearly.training.run import train

logger = logging.getLogger(__name__)

# The guidance rows that the tiny model was taught; the presets' scales are those of 7B models.
SETTINGS = ThoughtSettings(guidance_kind="normal", full_scale=2.0, pictures_scale=0.0, picture_top_k=0)
# Folder → how it is thought; drawing at once is a thought of one picture.
WAYS = {
    "at_once": replace(SETTINGS, mode="general", max_pictures=1),
    "critique": replace(SETTINGS, mode="critique"),
    "subgoals": replace(SETTINGS, mode="subgoals"),
}
SHOWN = 6  # thoughts of a kind on the page


def demonstrate(options: Options, method, count: int, batch_size: int) -> None:
    """Trains, thinks about `count` held-out prompts of two and three shapes in all `WAYS`, and writes report.html."""
    training = options.training
    output = Path(training.output_dir)
    training.output_dir, options.data.prepared_dir = str(output / "checkpoint"), str(output / "prepared")
    seconds, started = {}, time.perf_counter()
    train(options, method)
    seconds["prepare and train"] = time.perf_counter() - started

    # What is measured is what was saved, read back as a user would.
    editor = Editor(*load_any(training.output_dir))
    rows = thought_rows("subgoals", count, "test", seed=options.data.split_seed + 1, size=options.data.shapes_size)
    prompts, scenes = [Prompt(text) for text in rows["prompt"]], [Scene.from_json(text) for text in rows["scene"]]
    for name, settings in WAYS.items():
        run = {"model": training.output_dir, "prompts": count}
        think_prompts(editor, prompts, output / name, settings, run=run, batch_size=batch_size)
        write_pages(output / name, THOUGHTS_FILE)
    seconds["think"] = time.perf_counter() - started - seconds["prepare and train"]

    thoughts = {name: read_decoded(output / name / THOUGHTS_FILE) for name in WAYS}
    first, last = (
        {name: shown(output / name, rows, scenes, end) for name, rows in thoughts.items()} for end in (0, -1)
    )
    done = {
        "drawn at once": last["at_once"],
        "critique, first picture": first["critique"],
        "critique, last picture": last["critique"],
        "sub-goals, last picture": last["subgoals"],
        "the true picture through the tokenizer": through_tokenizer(editor, scenes),
    }
    shares = {name: sum(values) / count for name, values in done.items()}
    write_json(output / "metrics.json", {"prompts": count, "done": shares, "seconds": seconds, "machine": machine()})
    report(output, shares, thoughts["critique"], first["critique"], last["critique"], seconds)
    logger.info("%s", ", ".join(f"{name}: {share:.0%}" for name, share in shares.items()))
    logger.info("%s: open report.html", output)


def shown(folder: Path, rows: Sequence[dict], scenes: Sequence[Scene], end: int) -> list[bool]:
    """Whether the first (`end` 0) or the last (-1) picture of each thought is there and shows its scene."""
    there = [[path for path in row["image_paths"] if path is not None] for row in rows]
    return [bool(paths) and is_shown(load_image(folder / paths[end]), scene) for paths, scene in zip(there, scenes)]


def through_tokenizer(editor: Editor, scenes: Sequence[Scene]) -> list[bool]:
    """The best that a model can draw with its codes."""
    squares = [scene.render(editor.processor.image_size) for scene in scenes]
    codes = editor.model.token_model.encode(editor.processor.pixel_values(squares).to(editor.model.device))
    return [is_shown(picture, scene) for picture, scene in zip(to_pictures(editor.model, codes), scenes)]


def report(
    output: Path,
    shares: dict[str, float],
    critiques: Sequence[dict],
    first: Sequence[bool],
    last: Sequence[bool],
    seconds: dict[str, float],
) -> None:
    """Writes report.html: what was done, and critiques that put a picture right or spoiled one."""
    lines = [["", "The picture shows the prompt"], *([name, f"{share:.0%}"] for name, share in shares.items())]
    body = [f"<h1>Thinking with pictures</h1>{table(lines)}"]
    outcomes = {"Put right": (False, True), "Spoiled": (True, False), "Right and left so": (True, True)}
    for heading, outcome in outcomes.items():
        chosen = [row for row, *ends in zip(critiques, first, last) if tuple(ends) == outcome]
        cards = "".join(card(row, "critique/") for row in chosen[:SHOWN])
        body.append(f'<h2>{heading}: {len(chosen)}</h2><div class="list">{cards}</div>')
    links = " · ".join(f'<a href="{name}/index.html">{name.replace("_", " ")}</a>' for name in WAYS)
    time_taken = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    body.append(f'<p class="soft">All thoughts: {links}</p><p class="soft">{escape(machine())}; {time_taken}</p>')
    write_text(output / "report.html", page("Thinking with pictures", "\n".join(body), STYLE))
