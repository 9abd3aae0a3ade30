"""What a model is told and asked: a sample is a list of segments, a row is a sample with some segments withheld.

Condition dropout in training and guidance rows at inference are the same withholding. Knows no model: how segments
become token ids is the business of a family's processor.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Words:
    """Text. An `answer` is what the model should say: it carries loss, and it is never withheld."""

    text: str
    answer: bool = False


@dataclass(frozen=True)
class Seen:
    """A picture as the understanding tower sees it; `picture` is its index among the batch's pictures."""

    picture: int


@dataclass(frozen=True)
class Known:
    """A picture as its codes; `picture` is its index among the batch's pictures."""

    picture: int


@dataclass(frozen=True)
class Drawn:
    """The picture that the model draws. It carries loss."""


Segment = Words | Seen | Known | Drawn
Sample = tuple[Segment, ...]


def drawing(words: str, pictures: Iterable[int] = ()) -> Sample:
    """Draw a picture from words and the given pictures: an edit where there are any, text-to-image where not."""
    return (*[part for i in pictures for part in (Seen(i), Known(i))], Words(words), Drawn())


def answering(question: str, pictures: Iterable[int], answer: str | None = None) -> Sample:
    """Answer a question about pictures; `answer` is given in training."""
    said = () if answer is None else (Words(answer, answer=True),)
    return (*map(Seen, pictures), Words(question), *said)


FULL, NO_SOURCE, UNCOND = "full", "no_source", "uncond"
# What each named row withholds. A row is guided by its name (decoding/guidance.py), never by its place.
WITHHELD: dict[str, tuple[type, ...]] = {FULL: (), NO_SOURCE: (Known,), UNCOND: (Words, Seen, Known)}


@dataclass(frozen=True)
class Row:
    """A sample as one row of a batch shows it.

    Attributes:
        sample: all segments.
        withheld: indices of the segments that the model is not told.
    """

    sample: Sample
    withheld: frozenset[int] = frozenset()

    @property
    def tells_nothing(self) -> bool:
        """Whether every condition is withheld."""
        return self.withheld >= conditions(self.sample)


def conditions(sample: Sample) -> frozenset[int]:
    """Indices of the segments that can be withheld: what the model is told, not what it is asked for."""
    return frozenset(
        i
        for i, segment in enumerate(sample)
        if not isinstance(segment, Drawn) and not (isinstance(segment, Words) and segment.answer)
    )


def named_row(sample: Sample, name: str) -> Row:
    """The row of `WITHHELD` with this name."""
    kinds = WITHHELD[name]
    return Row(sample, frozenset(i for i in conditions(sample) if isinstance(sample[i], kinds)))


def named_rows(samples: Iterable[Sample], names: Iterable[str]) -> list[Row]:
    """For each sample its rows of these names, next to each other."""
    names = list(names)
    return [named_row(sample, name) for sample in samples for name in names]


@dataclass(frozen=True)
class Dropout:
    """Condition dropout, keyed to (seed, epoch, record): the same for any batch size, worker and process.

    Args:
        drop_all: share of rows that withhold everything, which trains the `uncond` row.
        drop_source: for each picture's codes, the share of the remaining rows that withhold them, which trains
            `no_source`.
        seed: keys the draws.
    """

    drop_all: float = 0.0
    drop_source: float = 0.0
    seed: int = 0

    def row(self, sample: Sample, key: str, epoch: int) -> Row:
        """The row that record `key` shows in this epoch. Samples that answer in words are shown whole."""
        if not any(isinstance(segment, Drawn) for segment in sample):
            return Row(sample)
        rng = np.random.default_rng((self.seed, epoch, zlib.crc32(key.encode())))
        if rng.random() < self.drop_all:
            return named_row(sample, UNCOND)
        known = [i for i, segment in enumerate(sample) if isinstance(segment, Known)]
        return Row(sample, frozenset(i for i in known if rng.random() < self.drop_source))
