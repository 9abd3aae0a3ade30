"""Thinking at scale: prompts into a folder of thoughts, shared out over processes and resumable.

Knows how thoughts are named, kept and found again. Does not know how a thought comes about, nor how it is shown.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from thinkclearly.data.thought_files import (
    ANSWERS_FILE,
    DECODED,
    DECODED_FILE,
    Prompt,
    detokenize,
    image_name,
    mark,
    write_lines,
)
from thinkclearly.decoding.settings import check_seed
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.editing.batch import claim
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.think import in_one_stream, think, thinking_fingerprint
from thinkclearly.files import write_text
from thinkclearly.generation.think import Picture, Text, Thought, decoded, whole
from thinkclearly.images import load_photo

THOUGHT_FILE, THOUGHTS_FILE = "thought.json", "thoughts.jsonl"


def think_prompts(
    editor: Editor,
    prompts: Sequence[Prompt],
    folder: str | Path,
    settings: ThoughtSettings,
    *,
    run: dict,
    num_thoughts: int = 1,
    batch_size: int = 8,
    seed: int = 0,
) -> int:
    """Thinks what is not yet thought; every process of a launch takes its share.

    Thought k of prompt i is number i · `num_thoughts` + k. It becomes the folder of that name, with `thought.json` and
    `image_0.png`, …, which appears only when complete, so that the same call again goes on. A thought about other
    words or pictures than before is thought anew. At the end come `thoughts.jsonl` with all of them,
    `decoded_results.jsonl` as the original's detokenizer writes it and, from a model with one stream, `answers.jsonl`
    as its inference does. A prompt with an answer is not thought about: its ids are decoded.

    Args:
        run: names what the thoughts come from; kept in `run.json`. A call that differs in it is refused.
        batch_size: thoughts at once; with the noise of its number each is the same in any batch.

    Returns:
        `int`: how many thoughts this call made, in all processes.

    Raises:
        ValueError: `folder` belongs to another run, or holds something else under a thought's name; or settings or
            prompts that the model cannot follow.
        ImageError: a prompt's picture that cannot be read.
    """
    check_seed(seed)
    folder, state = Path(folder), PartialState()
    if state.is_main_process:
        claim(folder, run | thinking_fingerprint(editor, settings))
    state.wait_for_everyone()
    numbers = range(len(prompts) * num_thoughts)
    mine = numbers[state.process_index :: state.num_processes]
    asked = {number: _digest(prompts[number // num_thoughts]) for number in mine}
    todo = [number for number in mine if _asked(folder, number) != asked[number]]
    options = {"miniters": 0, "mininterval": 1, "disable": not state.is_main_process}
    with tqdm(total=len(mine), desc="think", unit="thought", **options) as bar:
        bar.update(len(mine) - len(todo))
        for start in range(0, len(todo), batch_size):
            batch = {number: prompts[number // num_thoughts] for number in todo[start : start + batch_size]}
            for number, thought in _answers(editor, batch, settings, seed, bar):
                row, pictures = _record(editor, batch[number], thought)
                known = {"sample_id": number, "seed": seed, "asked": asked[number]}
                known |= {"size": editor.processor.image_size, "grid": editor.processor.grid}
                if thought is not None:
                    known |= {"mode": settings.mode, "ended": thought.ended}
                _save(folder, number, known | row, pictures)
                bar.update()
    state.wait_for_everyone()
    if state.is_main_process:
        _write_lines(folder, numbers)
    state.wait_for_everyone()
    return sum(gather_object([len(todo)]))


def _digest(prompt: Prompt) -> str:
    """Of the words, of the pictures' files and of the answer that is there."""
    pictures = [hashlib.sha256(path.read_bytes()).hexdigest() for path in prompt.images]
    return hashlib.sha256(json.dumps([prompt.text, pictures, prompt.response]).encode()).hexdigest()[:16]


def _asked(folder: Path, number: int) -> str | None:
    """What a thought is about; None where there is none. Raises `ValueError` where its place holds something else."""
    target = folder / str(number)
    if not target.exists():
        return None
    if not (target / THOUGHT_FILE).is_file():
        raise ValueError(f"{target} is there and has no {THOUGHT_FILE}. Give another --output_dir, or remove it.")
    return _read(folder, number)["asked"]


def _read(folder: Path, number: int) -> dict:
    return json.loads((folder / str(number) / THOUGHT_FILE).read_text(encoding="utf-8"))


def _answers(
    editor: Editor, batch: dict[int, Prompt], settings: ThoughtSettings, seed: int, bar: tqdm
) -> Iterator[tuple[int, Thought | None]]:
    """Number → thought, as they end; None for prompts that have an answer."""
    yield from ((number, None) for number, prompt in batch.items() if prompt.response is not None)
    numbers = [number for number, prompt in batch.items() if prompt.response is None]
    if not numbers:
        return
    stream = think(
        editor,
        [batch[number].text for number in numbers],
        settings,
        samples=[(seed, number) for number in numbers],
        pictures=[[load_photo(path) for path in batch[number].images] for number in numbers],
        on_step=lambda tokens: bar.set_postfix(tokens=tokens, refresh=False) or bar.update(0),
    )
    yield from ((numbers[i], thought) for i, thought in whole(stream))


def _record(editor: Editor, prompt: Prompt, thought: Thought | None) -> tuple[dict, list[Picture | None]]:
    """The text and ids of a thought's `thought.json`, and its pictures with those of the prompt; None for cut ones."""
    model, processor = editor.model, editor.processor
    if not in_one_stream(model):
        if thought is None:
            raise ValueError("A prompt has an answer of token ids, which only a Chameleon model reads; leave it out")
        answer = "".join(
            part.text if isinstance(part, Text) else mark(thought.pictures.index(part)) for part in thought.parts
        )
        return {"prompt": prompt.text, "text": prompt.text + answer, "answer": answer, "ids": None}, thought.pictures
    ids, drawn = (prompt.response, []) if thought is None else (thought.ids, thought.pictures)
    text, codes = detokenize(processor, ids)
    told = ids[: ids.index(processor.sep_id) + 1] if processor.sep_id in ids else []
    answer = text.removeprefix(detokenize(processor, told)[0])
    pictures = decoded(model, codes[: len(codes) - len(drawn)]) + drawn
    return {"prompt": prompt.text, "text": text, "answer": answer, "ids": list(ids)}, pictures


def _save(folder: Path, number: int, row: dict, pictures: Sequence[Picture | None]) -> None:
    target = folder / str(number)
    temporary, earlier = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
    for leftover in (temporary, earlier):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    names = [None if picture is None else image_name(number, k) for k, picture in enumerate(pictures)]
    for name, picture in zip(names, pictures):
        if picture is not None:
            picture.image.save(temporary / Path(name).name)
    about = [None if picture is None else _about(picture) for picture in pictures]
    row = row | {"image_paths": names, "pictures": about}
    write_text(temporary / THOUGHT_FILE, json.dumps(row, ensure_ascii=False) + "\n")
    if target.exists():
        target.rename(earlier)
    temporary.rename(target)
    shutil.rmtree(earlier, ignore_errors=True)


def _about(picture: Picture) -> dict:
    """What there is to know of a picture besides itself; masks as the numbers of their patches."""
    masks = {name: getattr(picture, name) for name in ("changed", "clear")}
    patches = {name: None if mask is None else mask.flatten().nonzero()[0].tolist() for name, mask in masks.items()}
    return {"passes": picture.passes, "codes": picture.codes, **patches}


def _write_lines(folder: Path, numbers: Sequence[int]) -> None:
    rows = [_read(folder, number) for number in numbers]
    write_lines(folder / THOUGHTS_FILE, rows)
    write_lines(folder / DECODED_FILE, ({name: row[name] for name in DECODED} for row in rows))
    if all(row["ids"] is not None for row in rows):
        write_lines(folder / ANSWERS_FILE, ({"prompt": row["prompt"], "response": row["ids"]} for row in rows))
