"""Thinking with pictures, for any family: one stream where it has one, else draw, ask what is wrong, and edit.

Knows what is asked about a picture. Does not know how pictures are drawn, read or edited.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from thinkclearly.decoding.interleaved import Ended
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.generation import think as stream
from thinkclearly.generation.describe import describe
from thinkclearly.generation.draw import draw, to_pictures
from thinkclearly.models.chameleon.model import Chameleon
from thinkclearly.models.fingerprint import fingerprint
from thinkclearly.models.instruction_head import InstructionModel

if TYPE_CHECKING:
    from thinkclearly.editing.editor import Editor

QUESTION = (
    "This picture should show: {prompt}\nWhat has to be changed in it? Answer with one instruction, such as "
    "'Make the cup blue.', or with 'Nothing.' if it shows all of that."
)
NOTHING = re.compile(r"\W*(nothing|none|no changes?)?\W*", re.IGNORECASE)
STREAM_ALONE = ("guidance_kind", "full_scale", "pictures_scale", "negative_scale", "prompt_scale")
ASKED, EDITED = 1, 2  # steps of a thought, which have noise of their own


def think(
    editor: Editor,
    prompts: Sequence[str],
    settings: ThoughtSettings,
    *,
    samples: Sequence[tuple[int, int]],
    pictures: Sequence[Sequence[Image.Image]] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, stream.Part]]:
    """Thinks about several prompts at once, with a model of any family; see `generation.think.think`.

    A family without words and pictures in one stream knows `mode: critique` alone: it draws, is asked what has to be
    changed, and edits its first picture by its own answer, unless that is "Nothing." What it leaves unchanged stays
    the first picture's own bytes. It draws by its own settings, except for those of `settings` that are not left as
    they are.

    Raises:
        ValueError: as there, or settings that the family cannot follow.
    """
    if in_one_stream(editor.model):
        options = {"samples": samples, "pictures": pictures, "on_step": on_step}
        return stream.think(editor.model, editor.processor, prompts, settings, **options)
    if pictures is not None and any(pictures):
        raise ValueError("This model thinks about words alone; leave out the prompt's images, or edit them")
    return _by_turns(editor, prompts, settings, samples, on_step)


def in_one_stream(model: InstructionModel) -> bool:
    """Whether words and pictures are tokens of one vocabulary, so that either can go on from the other."""
    return isinstance(model.token_model, Chameleon)


def thinking_fingerprint(editor: Editor, settings: ThoughtSettings) -> dict:
    """What a thought depends on besides the prompt and the seed; see `models.fingerprint`."""
    if in_one_stream(editor.model):
        return fingerprint(editor.model) | {"thinking": asdict(settings)}
    return editor.fingerprint(**picture_settings(settings)) | {"thinking": asdict(settings)}


def _by_turns(
    editor: Editor,
    prompts: Sequence[str],
    settings: ThoughtSettings,
    samples: Sequence[tuple[int, int]],
    on_step: Callable[[int], None] | None,
) -> Iterator[tuple[int, stream.Part]]:
    overrides = picture_settings(settings)
    model, processor = editor.model, editor.processor
    drawn = draw(model, processor, prompts, replace(editor.settings, **overrides), samples=samples, on_step=on_step)
    pictures = zip(to_pictures(model, drawn.fed_codes), drawn.fed_codes.tolist())
    first = [stream.beside(image, codes, None, drawn.passes, None) for image, codes in pictures]
    yield from enumerate(first)
    if settings.max_pictures == 1:
        yield from ((number, Ended("max_pictures", [])) for number in range(len(prompts)))
        return
    wanted = {}  # number → instruction
    for number, prompt in enumerate(prompts):
        answer = _answer(editor, first[number].image, prompt, settings, samples[number])
        yield number, stream.Text(answer, [])
        if NOTHING.fullmatch(answer):
            yield number, Ended("satisfied", [])
        else:
            wanted[number] = answer
    if wanted:
        results = editor.edit_many(
            [first[number].image for number in wanted],
            list(wanted.values()),
            seed=[_seed(samples[number], EDITED) for number in wanted],
            progress=None if on_step is None else lambda done, _: on_step(done),
            **overrides,
        )
        for number, edit in zip(wanted, results):
            codes, clear = edit.fed_codes.tolist(), edit.clear if len(model.vocabulary) else None
            yield number, stream.beside(edit.image, codes, clear, edit.passes, first[number])
            yield number, Ended("edited", [])


def picture_settings(settings: ThoughtSettings) -> dict:
    """How a model without a stream draws and edits, as overrides of its own settings: what is not left as it is.

    Raises:
        ValueError: settings that only a stream can follow; the message names them.
    """
    able = {"mode": "critique", "second": "edit", **dict.fromkeys(STREAM_ALONE)}
    foreign = [f"{name}={value!r}" for name in able if (value := getattr(settings, name)) != able[name]]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)}: only a model of words and pictures in one stream, as Chameleon, can do that; "
            "leave it out"
        )
    default, drawing = vars(ThoughtSettings().drawing()), vars(settings.drawing())
    return {name: value for name, value in drawing.items() if value != default[name]}


def _answer(editor: Editor, picture: Image.Image, prompt: str, settings: ThoughtSettings, sample) -> str:
    sampling = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
    question = QUESTION.format(prompt=prompt.strip())
    options = sampling | {"seed": _seed(sample, ASKED)}
    return describe(editor.model, editor.processor, picture, question, **options)[0]


def _seed(sample: tuple[int, int], step: int) -> int:
    """Another one for each step, so that an edit does not draw on the noise that its source was drawn from."""
    return int(np.random.SeedSequence((*sample, step)).generate_state(1, np.uint64)[0])
