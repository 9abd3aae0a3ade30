"""Prompts drawn into a folder: shared out over processes, and the same call again goes on where it stopped.

Knows how pictures are named, kept and found again. Knows nothing of benchmarks or of what a picture is judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from thinkclearly.decoding.engine import Decoded
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.editing.batch import claim
from thinkclearly.editing.editor import Editor
from thinkclearly.files import replacing
from thinkclearly.generation.draw import draw, to_pictures
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor

WORDS = "prompt"  # the PNG text chunk that says what a picture was drawn from


@dataclass(frozen=True)
class Prompt:
    """Words to draw, and the name of each sample's picture inside the folder."""

    text: str
    files: tuple[str, ...]


def draw_prompts(
    editor: Editor, prompts: Sequence[Prompt], folder: Path, *, run: dict, batch_size: int, seed: int, **overrides
) -> None:
    """Draws what is not yet drawn; every process of a launch takes its share of the prompts.

    A picture appears only when complete, and holds its prompt (PNG text "prompt"): one that was drawn from other words
    is drawn anew. See `draw_numbered` for the noise. Returns when all processes are done.

    Args:
        prompts: with the same number of samples each.
        run: names what the pictures come from; kept in `run.json`. A call that differs in it is refused.
        batch_size: pictures that are drawn at once; those of a prompt stay together.
        overrides: fields of `EditSettings`, over the editor's.

    Raises:
        ValueError: `folder` belongs to another run, or a prompt is empty.
    """
    state, settings = PartialState(), replace(editor.settings, **overrides)
    if state.is_main_process:
        claim(folder, run | editor.fingerprint(**overrides))
    state.wait_for_everyone()
    mine = range(state.process_index, len(prompts), state.num_processes)
    todo = [i for i in mine if not all(_words(folder / name) == prompts[i].text for name in prompts[i].files)]
    count = max(1, batch_size // len(prompts[0].files))
    with tqdm(total=len(mine), desc="draw", unit="prompt", disable=not state.is_main_process) as bar:
        bar.update(len(mine) - len(todo))
        for start in range(0, len(todo), count):
            batch = {i: prompts[i] for i in todo[start : start + count]}
            words = {i: prompt.text for i, prompt in batch.items()}
            decoded = draw_numbered(editor.model, editor.processor, words, settings, seed, len(prompts[0].files))
            files = [(name, prompt.text) for prompt in batch.values() for name in prompt.files]
            for picture, (name, text) in zip(to_pictures(editor.model, decoded.fed_codes), files):
                _save(picture, folder / name, text)
            bar.update(len(batch))
    state.wait_for_everyone()


def draw_numbered(
    model: InstructionModel,
    processor: Processor,
    words: dict[int, str],
    settings: DecodeSettings,
    seed: int,
    num_images: int,
) -> Decoded:
    """Draws `num_images` samples of each prompt; those of a prompt lie next to each other.

    A picture's noise is keyed by the seed and the prompt's number, so it does not depend on what is drawn beside it,
    and no two pictures of a benchmark share theirs.

    Args:
        words: number → prompt.
    """
    samples = [(seed, number * num_images + k) for number in words for k in range(num_images)]
    return draw(model, processor, list(words.values()), settings, samples=samples)


def _words(path: Path) -> str | None:
    """What a picture was drawn from; None where there is no whole one."""
    try:
        with Image.open(path) as picture:
            return picture.info.get(WORDS)
    except OSError:
        return None


def _save(picture: Image.Image, path: Path, text: str) -> None:
    info = PngInfo()
    info.add_itxt(WORDS, text)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
