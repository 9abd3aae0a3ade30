"""Teaches the shipped tiny base what it does not know by `method: sft`: `python -m experiments.sft_tiny`.

Writes one ShareGPT JSON of drawings, edits and questions, trains through `thinkclearly train`, and measures base and
result on held-out prompts. What is there already is not done again; the training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from experiments.sft_tiny.lessons import KINDS, Lesson, lessons, new_words
from thinkclearly.commands.train import main as train
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.report import machine
from thinkclearly.files import write_json, write_text
from thinkclearly.generation.draw import draw, to_pictures
from thinkclearly.images import to_image
from thinkclearly.models.finetunes import load_any
from thinkclearly.reporting.tables import markdown_table

logger = logging.getLogger("sft_tiny")

HERE = Path(__file__).parent
TITLES = {"draw": "text-to-image", "edit": "edit", "question": "question"}
GREEDY = {"use_cfg": False, "temperature": 0.0}
# Everything but the VQ tokenizer learns, as in Janus-4o's training.
PARTS = ("vision_model", "aligner", "generation_embeddings", "generation_aligner", "generation_head")
PARTS += ("language_model", "lm_head")


def write_lessons(directory: Path, amount: int) -> Path:
    """`amount` records of each kind, half of them about something new, in one ShareGPT JSON with its pictures."""
    path = directory / "lessons.json"
    if path.is_file():
        return path
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    records = []
    for kind in KINDS:
        for new in (True, False):
            for lesson in lessons(kind, new, amount // 2, seed=1, split="train"):
                records.append(_record(lesson, f"pictures/{len(records):05d}", directory))
    write_json(path, records)
    return path


def _record(lesson: Lesson, name: str, directory: Path) -> dict:
    record = {"input_prompt": lesson.words}
    if (source := lesson.source) is not None:
        source.save(directory / f"{name}_in.png")
        record["input_image"] = [f"{name}_in.png"]
    if lesson.answer:
        return record | {"output_text": lesson.answer}
    lesson.target.save(directory / f"{name}_out.png")
    return record | {"output_image": f"{name}_out.png"}


def teach(path: Path, output: Path, epochs: float, rate: float) -> None:
    """One run of `thinkclearly train --method sft`."""
    options = {
        "method": "sft",
        "base_model": "tiny",
        "lora_r": 0,
        "source": "sharegpt4o",
        "path": path,
        "prepared_dir": output.parent / "prepared",
        "eval_samples": 96,
        "drop_all": 0.05,
        "drop_source": 0.1,
        # As the base was made: what an edit leaves alone keeps its codes, and counts a third of what it changes.
        "source_codes": "true",
        "source_weight": 0.33,
        # An answer has about 5 words, a picture 64 codes.
        "answer_weight": 8,
        "output_dir": output,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "num_train_epochs": epochs,
        "eval_steps": 100,
        "save_steps": 100,
        "save_total_limit": 1,
    }
    train([text for name, value in options.items() for text in (f"--{name}", str(value))] + ["--train_parts", *PARTS])


def answers(editor: Editor, kind: str, batch: list[Lesson]) -> list:
    """What a model makes of a batch: pictures or words."""
    if kind == "draw":
        settings = DecodeSettings(**GREEDY)
        prompts, samples = [lesson.words for lesson in batch], [(0, 0)] * len(batch)
        drawn = draw(editor.model, editor.processor, prompts, settings, samples=samples)
        return to_pictures(editor.model, drawn.fed_codes)
    if kind == "edit":
        results = editor.edit_many([lesson.source for lesson in batch], [lesson.words for lesson in batch], **GREEDY)
        return [result.token_composite for result in results]
    return [editor.describe(lesson.source, lesson.words, max_new_tokens=16)[0] for lesson in batch]


def autoencoded(editor: Editor, kind: str, batch: list[Lesson]) -> list:
    """The true targets through the tokenizer: the most that any model can draw with it."""
    family = editor.model.token_model
    with torch.inference_mode():
        pixels = editor.processor.pixel_values([lesson.target for lesson in batch])
        return [to_image(picture) for picture in family.decode(family.encode(pixels))]


def measure(held_out: dict[str, list[Lesson]], make, editor: Editor, file: Path, kinds=KINDS) -> dict[str, float]:
    """Share done of each part of `held_out`; what `file` has already is not measured again."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    for name, part in held_out.items():
        kind = name.split()[0]
        if name in found or kind not in kinds:
            continue
        done = []
        for start in tqdm(range(0, len(part), 25), desc=f"{file.stem}: {name}"):
            batch = part[start : start + 25]
            done += [lesson.is_done(result) for lesson, result in zip(batch, make(editor, kind, batch))]
        found[name] = float(np.mean(done))
        write_json(file, found)
    return found


def trivial(held_out: dict[str, list[Lesson]], taught: list[dict]) -> dict[str, float]:
    """Copying the source, and always the answer that is most frequent in the training records to that question."""
    frequent: dict[str, Counter] = {}
    for record in taught:
        if "output_text" in record:
            frequent.setdefault(record["input_prompt"].split(" the ")[0], Counter())[record["output_text"]] += 1
    found = {}
    for name, part in held_out.items():
        if name.startswith("edit"):
            found[name] = float(np.mean([lesson.is_done(lesson.source) for lesson in part]))
        if name.startswith("question"):
            said = {start: words.most_common(1)[0][0] for start, words in frequent.items()}
            found[name] = float(np.mean([lesson.is_done(said[lesson.words.split(" the ")[0]]) for lesson in part]))
    return found


def report(results: dict) -> str:
    """`results.md`."""
    columns = ("before", "after", "trivial", "tokenizer")
    lines = []
    for name in results["before"]:
        kind, age = name.split()
        shares = (results[column].get(name) for column in columns)
        lines.append([TITLES[kind], age, *("–" if share is None else f"{share:.1%}" for share in shares)])
    table = markdown_table(["kind", "about", "before", "after", "trivial", "tokenizer's ceiling"], lines)
    width = 1.96 * 50 / results["held_out"] ** 0.5
    return f"""# Teaching the tiny base two colours and a shape

`{results["command"]}`: {results["records"]} records of each kind (half about pink, brown or diamonds, half of old
colours and shapes), {results["epochs"]:g} epochs of `method: sft`, all parts but the VQ tokenizer.
Machine: {results["machine"]}.
Training: {results["training_cpu_minutes"]:.1f} CPU minutes, {results["training_minutes"]:.1f} minutes on the clock.

{results["held_out"]} held-out prompts of each kind and age, over photographs that training never drew on. Greedy,
without guidance. Pictures are judged by the generator's judge, answers by exact match. "old" is what the base was made
with, but nobody had ever asked it questions. They ask for the colour of the background: which colour a shape has, or
what is at a place, was not learnt in 600 steps.

{table}

*trivial*: copying the source; always the most frequent answer to that question. *tokenizer's ceiling*: the true
picture encoded and decoded. The 95 % intervals reach ±{width:.1f} points at most.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.sft_tiny", description=__doc__)
    parser.add_argument("--records", type=int, default=1200, help="Training records of each kind.")
    parser.add_argument("--epochs", type=float, default=2, help="Passes over them.")
    parser.add_argument("--rate", type=float, default=3e-4, help="Peak learning rate.")
    parser.add_argument("--held_out", type=int, default=300, help="Prompts of each kind, about new and about old.")
    parser.add_argument("--work", type=Path, default=Path("outputs/sft_tiny"), help="Data, checkpoints, part results.")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work, times = options.work, options.work / "times.json"
    with new_words():
        path = write_lessons(work, options.records)
        if not times.is_file():
            clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            teach(path, work / "model", options.epochs, options.rate)
            after = resource.getrusage(resource.RUSAGE_SELF)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            write_json(
                times, {"training_cpu_minutes": used / 60, "training_minutes": (time.perf_counter() - clock) / 60}
            )
        held_out = {
            f"{kind} {age}": lessons(kind, age == "new", options.held_out, seed=2, split="test")
            for age in ("new", "old")
            for kind in KINDS
        }
        models = {"before": "tiny", "after": str(work / "model")}
        editors = {name: Editor(*load_any(model)) for name, model in models.items()}
        found = {
            name: measure(held_out, answers, editors[name], work / f"{name}.json") for name in ("after", "before")
        }
        ceiling = measure(held_out, autoencoded, editors["before"], work / "tokenizer.json", KINDS[:2])
        results = {
            "command": "python -m experiments.sft_tiny "
            + " ".join(f"--{name} {getattr(options, name):g}" for name in ("records", "epochs", "rate", "held_out")),
            "machine": f"{machine()}, of {os.cpu_count()} cores shared with other work",
            "records": options.records,
            "epochs": options.epochs,
            "held_out": options.held_out,
            **json.loads(times.read_text()),
            **found,
            "trivial": trivial(held_out, json.loads(path.read_text())),
            "tokenizer": ceiling,
        }
    write_json(HERE / "results.json", results)
    write_text(HERE / "results.md", report(results))
    logger.info("%s", report(results))


if __name__ == "__main__":
    main()
