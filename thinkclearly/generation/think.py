"""A prompt to words and pictures in turn, as they come: a model that reads and draws in one stream thinks aloud.

Knows templates, text and pictures. Does not know how tokens are chosen (`decoding/interleaved.py`), nor how a family
whose pictures are no part of its stream thinks (`editing/think.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from thinkclearly.data.thought_files import MARK
from thinkclearly.decoding.interleaved import Context, Drew, Ended, Said, context, interleave
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.generation.draw import to_pictures
from thinkclearly.images import patch_difference
from thinkclearly.models.chameleon.processor import ChameleonProcessor
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.reporting.pictures import mask_image

CHANGED = 16  # levels of 255: a patch with a larger difference is another one


@dataclass(frozen=True)
class Text:
    """Words of a thought, and their token ids in its stream, if it is one."""

    text: str
    ids: list[int]


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a thought, of the model's own square size.

    Attributes:
        codes: N, what the model reads of it.
        changed: bool (g, g), patches that differ from the picture before by more than `CHANGED` levels; None for the
            first.
        clear: bool (g, g), patches copied from the picture before, byte for byte; None where nothing could be.
        passes: forward passes that it took.
    """

    image: Image.Image
    codes: list[int] = field(repr=False)
    changed: np.ndarray | None = field(repr=False)
    clear: np.ndarray | None = field(repr=False)
    passes: int


Part = Text | Picture | Ended


@dataclass
class Thought:
    """A whole thought: `Thought(list(model.think(...)))`.

    Attributes:
        ended, ids: as `Ended` says, where the thought comes from `whole`.
    """

    parts: list[Text | Picture]
    ended: str = ""
    ids: list[int] = field(default_factory=list, repr=False)

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def first(self) -> Image.Image:
        """The first picture. Raises `ValueError` if there is none."""
        return self._picture(0)

    @property
    def last(self) -> Image.Image:
        """The last picture. Raises `ValueError` if there is none."""
        return self._picture(-1)

    @property
    def text(self) -> str:
        """What was said, without the pictures."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    def _picture(self, k: int) -> Image.Image:
        if not self.pictures:
            raise ValueError("The thought has no picture: it ended in words. mode=critique draws one first.")
        return self.pictures[k].image


def think(
    model: InstructionModel,
    processor: ChameleonProcessor,
    prompts: Sequence[str],
    settings: ThoughtSettings,
    *,
    samples: Sequence[tuple[int, int]],
    pictures: Sequence[Sequence[Image.Image]] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Part]]:
    """Thinks about several prompts at once: (number of the prompt, words or a picture), as they come, then its end.

    Args:
        samples: (seed, number) of each thought, which key its noise: it does not depend on what is thought beside it.
        pictures: of each prompt, RGB; they stand where it says `<image>`, before its words if it does not.
        on_step: called with the tokens that came, after each pass.

    Raises:
        ValueError: as `decoding.interleaved.context`.
    """
    shown = pictures or [()] * len(prompts)
    contexts = [_context(model, processor, *each, settings) for each in zip(prompts, shown)]
    before: dict[int, Picture] = {}
    for number, part in interleave(model, processor, contexts, settings, samples, on_step):
        if isinstance(part, Said):
            part = Text(processor.decode_words(part.ids), part.ids)
        elif isinstance(part, Drew):
            part = before[number] = _picture(model, part, before.get(number))
        yield number, part


def _context(model: InstructionModel, processor, prompt: str, pictures, settings: ThoughtSettings) -> Context:
    if not pictures:
        return context(processor, prompt, settings)
    squares = processor.pixel_values([processor.square(picture) for picture in pictures])
    codes = model.token_model.encode(squares.to(model.device)).tolist()
    return context(processor, prompt if MARK in prompt else MARK * len(codes) + prompt, settings, codes)


def _picture(model: InstructionModel, drew: Drew, before: Picture | None) -> Picture:
    (image,), clear = to_pictures(model, torch.tensor([drew.codes], device=model.device)), None
    if drew.copied is not None:
        clear = np.reshape(drew.copied, (model.token_model.grid, -1))
        image = Image.composite(before.image, image, mask_image(clear, image.size))
    return beside(image, drew.codes, clear, drew.passes, before)


def beside(
    image: Image.Image, codes: list[int], clear: np.ndarray | None, passes: int, before: Picture | None
) -> Picture:
    """A picture beside the one before it."""
    grid = round(len(codes) ** 0.5)
    changed = None if before is None else patch_difference(before.image, image, grid) > CHANGED
    return Picture(image, codes, changed, clear, passes)


def decoded(model: InstructionModel, pictures: Sequence[Sequence[int] | None]) -> list[Picture | None]:
    """Pictures of a stream from their codes, each beside the one before it; None for those that are not whole."""
    result, before = [], None
    for codes in pictures:
        if codes is not None:
            image = to_pictures(model, torch.tensor([codes], device=model.device))[0]
            before = beside(image, list(codes), None, 0, before)
        result.append(None if codes is None else before)
    return result


def whole(stream: Iterable[tuple[int, Part]]) -> Iterator[tuple[int, Thought]]:
    """Each thought of a stream once it has ended."""
    parts: dict[int, list[Text | Picture]] = {}
    for number, part in stream:
        if isinstance(part, Ended):
            yield number, Thought(parts.pop(number, []), part.reason, part.ids)
        else:
            parts.setdefault(number, []).append(part)
