"""PairComp: pairs of prompts that differ in one thing, drawn twice each and scored by a model that is asked.

Knows its files and its two means. Knows nothing of how pictures are drawn, or of the model that is asked.
Source: FocusDiff, arXiv 2506.05501, github.com/wendell0218/FocusDiff/tree/main/PairComp.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thinkclearly.data.sources import BadRecord, read_json

# a word of the file's category → its name; `summary_scores.py` there looks for the word
CATEGORIES = {
    "overall": "Overall appearance",
    "color": "Color",
    "counting": "Counting",
    "position": "Position",
    "style": "Style & Tone",
    "text": "Text",
}
AVERAGE = "Average"
JUDGE = "InternVL2.5-26B"  # the authors'
MEANS = ("arithmetic", "geometric")
COLUMNS = {name: (f"{name} ↑", "{:.1f}") for name in (*CATEGORIES.values(), AVERAGE)}  # ×100


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in one thing, and its category."""

    category: str
    captions: tuple[str, str]


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs of `PairComp.json`, an array of `{"category", "caption1", "caption2"}`. The public one has 550 pairs.

    Raises:
        BadRecord: a record without the three texts, or of a category that PairComp has not.
    """
    pairs = []
    for number, record in enumerate(read_json(Path(path), list)):
        where = f"{path}: pair {number}"
        texts = [record.get(name) for name in ("category", "caption1", "caption2")] if type(record) is dict else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise BadRecord(f"{where} is {record!r:.80}; expected an object with category, caption1 and caption2.")
        found = [name for word, name in CATEGORIES.items() if word in texts[0].lower()]
        if len(found) != 1:
            raise BadRecord(
                f"{where}: the category is {texts[0]!r}; expected one of {', '.join(CATEGORIES.values())}."
            )
        pairs.append(Pair(found[0], (texts[1], texts[2])))
    if not pairs:
        raise ValueError(f"{path} holds no pair; is it complete?")
    return pairs


def read_scores(path: str | Path) -> dict[int, list[float]]:
    """Scores as the original's `evaluate_images.py` and our runs write them: number of the pair → its pictures'.

    Raises:
        BadRecord: a file of another form.
    """
    scores = {}
    for number, records in read_json(Path(path), dict).items():
        try:
            scores[int(number)] = [float(record["score"]) for record in records]
        except (TypeError, KeyError, ValueError) as error:
            raise BadRecord(
                f"{path}: pair {number} is {records!r:.80}; expected a list of objects with pair_idx, prompt_idx, "
                "image_idx and score."
            ) from error
    return scores


def scores_file(scores: Sequence[Sequence[Sequence[float]]]) -> dict[str, list[dict]]:
    """`scores[pair][prompt][image]` in the original's form, for its `summary_scores.py`."""
    return {
        str(pair): [
            {"pair_idx": pair, "prompt_idx": prompt, "image_idx": image, "score": score}
            for prompt, images in enumerate(prompts)
            for image, score in enumerate(images)
        ]
        for pair, prompts in enumerate(scores)
    }


def summarise(pairs: Sequence[Pair], scores: dict[int, list[float]]) -> dict[str, dict[str, float | None]]:
    """PairComp's result: category → "arithmetic" and "geometric"; a category without pairs is left out.

    A pair's scores, of all pictures of both prompts, become their arithmetic and their geometric mean: one picture
    that scores 0 makes the latter 0. A category is the mean of its pairs, "Average" that of the categories, whatever
    their sizes, as `summary_scores.py` computes it.

    Args:
        scores: number of the pair → its pictures' scores in [0, 1]; pairs without scores do not count.

    Raises:
        ValueError: scores of pairs that are not there, or of none.
    """
    if unknown := [number for number in scores if not 0 <= number < len(pairs)]:
        raise ValueError(f"scores of pair {unknown[0]}, but there are {len(pairs)} pairs; are these its prompts?")
    means = pair_means((pairs[number].category, values) for number, values in scores.items())
    order = [name for name in (*CATEGORIES.values(), AVERAGE) if name in means]
    return {name: means[name] for name in order}


def pair_means(scored: Iterable[tuple[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """(category, scores of a pair's pictures) for each pair → category and "Average" → both means; see `summarise`."""
    found: dict[str, list[tuple[float, float]]] = {}
    for category, scores in scored:
        means = sum(scores) / len(scores), math.prod(scores) ** (1 / len(scores))
        found.setdefault(category, []).append(means)
    if not found:
        raise ValueError("no pair has scores")
    result = {name: _mean(pairs) for name, pairs in found.items()}
    return result | {AVERAGE: _mean([tuple(means.values()) for means in result.values()])}


def _mean(rows: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {name: sum(values) / len(rows) for name, values in zip(MEANS, zip(*rows))}
