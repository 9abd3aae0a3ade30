"""GenEval's prompts and rules: whether the objects found in a picture are those that its prompt asks for.

Knows prompts, boxes and colours by name. Knows nothing of pictures, or of the models that find objects in them.
Source: GenEval, arXiv 2310.11513,
github.com/djghosh13/geneval/blob/main/evaluation/{evaluate_images,summary_scores}.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from thinkclearly.data.sources import BadRecord

TAGS = {
    "single_object": "Single object",
    "two_object": "Two objects",
    "counting": "Counting",
    "colors": "Colors",
    "position": "Position",
    "color_attr": "Color attribution",
}
OVERALL = "overall"
COLUMNS = {name: (f"{heading} ↑", "{:.2f}") for name, heading in (TAGS | {OVERALL: "Overall"}).items()}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
# `object_names.txt` there: COCO's classes in COCO's order, three of them under other names.
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
CLASSES = tuple(name.strip() for name in _NAMES.split(","))

# An object counts above this score; where objects are counted, above the second one.
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16  # of a class, the surest ones; overlapping ones are all kept ("max_overlap" is 1 there)
POSITION_THRESHOLD = 0.1  # of the two objects' sizes, which an offset has to exceed


@dataclass(frozen=True)
class Found:
    """An object in a picture: its class, how sure it is, its box (left, top, right, bottom; pixels), and its mask."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = field(default=None, compare=False)  # bool (H, W)


@dataclass(frozen=True)
class Request:
    """Objects that a prompt asks for, or, to be excluded, how many of them are too many.

    Attributes:
        position: where they are, e.g. "left of", and the number of the request that they are so of.
    """

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Item:
    """A line of `evaluation_metadata.jsonl`."""

    tag: str
    prompt: str
    include: tuple[Request, ...]
    exclude: tuple[Request, ...]
    line: str


def read_items(path: str | Path) -> list[Item]:
    """GenEval's `prompts/evaluation_metadata.jsonl`, 553 prompts, or a file of its form.

    Raises:
        BadRecord: a line of another form, or about a class, colour or position that GenEval has not.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecord(f"{path}: cannot be read as JSON lines ({error}).") from error
    items = [_item(f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise ValueError(f"{path} holds no prompt; is it complete?")
    return items


def _item(where: str, line: str) -> Item:
    try:
        record = json.loads(line)
        include, exclude = (tuple(map(_request, record.get(name, []))) for name in ("include", "exclude"))
        item = Item(record["tag"], record["prompt"].strip(), include, exclude, line.strip())
        if item.tag not in TAGS or not item.prompt or not include:
            raise ValueError(f"a tag of {', '.join(TAGS)}, a prompt and what to include")
        for number, request in enumerate(include):
            if request.position is not None and not 0 <= request.position[1] < number:
                raise ValueError("a position relative to an earlier object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadRecord(f"{where}: found {line.strip():.100}; expected {error}.") from error
    return item


def _request(record: dict) -> Request:
    position = record.get("position")
    position = None if position is None else (str(position[0]), int(position[1]))
    request = Request(record["class"], int(record["count"]), record.get("color"), position)
    for kind, value, known in (
        ("class", request.name, CLASSES),
        ("color", request.colour, (None, *COLOURS)),
        ("position", position and position[0], (None, *POSITIONS)),
    ):
        if value not in known:
            raise ValueError(f"a {kind} of GenEval's, not {value!r}")
    return request


def kept(found: Sequence[Found], tag: str) -> dict[str, list[Found]]:
    """The objects that count for a prompt, by class, the surest first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Found]] = {}
    for each in sorted(found, key=lambda each: -each.score):
        if each.score > threshold and len(objects.get(each.name, [])) < MAX_OBJECTS:
            objects.setdefault(each.name, []).append(each)
    return objects


def judge(item: Item, found: Sequence[Found], colours: Callable[[list[Found]], list[str]]) -> str:
    """What is wrong with a picture; "" for a correct one.

    All that is to be included must be there, in number, colour and position, judged on the surest objects of a class,
    as many as are asked for; and nothing that is excluded.

    Args:
        colours: the colour of each of some objects of one class.
    """
    objects, reasons = kept(found, item.tag), []
    groups: list[list[Found] | None] = []  # of each request; None where it is not met
    for request in item.include:
        group = objects.get(request.name, [])[: request.count]
        reason = _missing(request, group, colours) or _misplaced(request, group, groups)
        groups.append(None if reason else group)
        reasons += [reason] if reason else []
    for request in item.exclude:
        if (count := len(objects.get(request.name, []))) >= request.count:
            reasons.append(f"expected {request.name}<{request.count}, found {count}")
    return "; ".join(reasons)


def _missing(request: Request, group: list[Found], colours: Callable[[list[Found]], list[str]]) -> str:
    if len(group) < request.count:
        return f"expected {request.name}>={request.count}, found {len(group)}"
    if request.colour is None:
        return ""
    seen = colours(group)
    if seen.count(request.colour) < request.count:
        return f"expected {request.colour} {request.name}>={request.count}, found {', '.join(seen)}"
    return ""


def _misplaced(request: Request, group: list[Found], groups: list[list[Found] | None]) -> str:
    if request.position is None:
        return ""
    relation, number = request.position
    if groups[number] is None:
        return f"no target for {request.name} to be {relation}"
    for each in group:
        for target in groups[number]:
            true = relative_position(each.box, target.box)
            if relation not in true:
                return f"expected {request.name} {relation} target, found {' and '.join(sorted(true)) or 'neither'}"
    return ""


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box `a` is of box `b`: one of `POSITIONS`, two, or none.

    The offset of the centres, less a tenth of both sizes in each direction, over its whole length: more than half.
    """
    boxes = np.array([a, b], float).reshape(2, 2, 2)  # box, corner, axis
    offset = np.subtract(*boxes.mean(axis=1))
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    tests = zip(POSITIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5))
    return {name for name, true in tests if true}


def summarise(judged: Iterable[tuple[str, Sequence[bool]]]) -> dict[str, dict[str, float]]:
    """(tag, whether each picture is correct) of each prompt → "images" and "prompts" → tag and "overall" → share.

    "images" is what is published: the share of pictures of a tag that are correct, and the mean over tags. "prompts"
    counts a prompt as soon as one of its pictures is correct.
    """
    by_tag: dict[str, list[Sequence[bool]]] = {}
    for tag, correct in judged:
        by_tag.setdefault(tag, []).append(correct)
    result = {}
    for name, values in (("images", sum), ("prompts", any)):
        shares = {
            tag: sum(map(values, by_tag[tag])) / sum(1 if values is any else len(each) for each in by_tag[tag])
            for tag in TAGS
            if tag in by_tag
        }
        result[name] = shares | {OVERALL: sum(shares.values()) / len(shares)}
    return result
