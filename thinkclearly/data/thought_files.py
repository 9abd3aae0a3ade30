"""Thoughts as files: prompts, the original's answers as token ids, and what its detokenizer makes of them.

Knows lines and ids. Knows nothing of models: which pictures codes stand for is theirs to say.
Source: `inference.py` and the detokenizer of github.com/GAIR-NLP/thinking-with-generated-images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from thinkclearly.data.sources import BadRecord, inside
from thinkclearly.files import replacing
from thinkclearly.models.chameleon.processor import ChameleonProcessor

MARK = "<image>"  # where a prompt shows a picture
ANSWERS_FILE, DECODED_FILE = "answers.jsonl", "decoded_results.jsonl"
DECODED = ("sample_id", "text", "image_paths")  # what the latter's lines hold


@dataclass(frozen=True)
class Prompt:
    """What is to be thought about.

    Attributes:
        text: with `<image>` where each of the pictures is shown; before the words where it has none.
        images: files of the pictures.
        response: ids of an answer that is already there, prompt included.
    """

    text: str
    images: tuple[Path, ...] = ()
    response: tuple[int, ...] | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """The original's input, a line `{"prompt", "images"?}` each, or its output, `{"prompt", "response"}`.

    Raises:
        BadRecord: a line of another form, or with a picture outside the file's folder; the message says `FILE:LINE`.
        ValueError: no line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecord(f"{path}: cannot be read as JSON lines ({error}).") from error
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ValueError(f'{path} holds no prompt; expected lines as {{"prompt": "A red kite above two hills."}}')
    return prompts


def _prompt(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not a JSON object ({error}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise BadRecord(f"{where}: found {line.strip():.60}; expected an object with a 'prompt'.")
    images, response = record.get("images") or [], record.get("response")
    if not isinstance(images, list):
        raise BadRecord(f"{where}: 'images' is {images!r:.60}, expected a list of paths.")
    if response is not None and not (isinstance(response, list) and all(type(i) is int and i >= 0 for i in response)):
        raise BadRecord(f"{where}: 'response' is {response!r:.60}, expected a list of token ids.")
    marks = record["prompt"].count(MARK)
    if marks and response is None and marks != len(images):
        raise BadRecord(f"{where}: the prompt has {marks} {MARK} and {len(images)} images; expected as many.")
    files = tuple(inside(path.parent, image, f"{where}: images") for image in images)
    return Prompt(record["prompt"], files, None if response is None else tuple(response))


def pieces(processor: ChameleonProcessor, ids: Iterable[int]) -> Iterator[list[int] | tuple[int, ...] | None]:
    """Ids in pieces: a list of words' ids, a tuple of a picture's codes, or None for a picture that is not whole.

    A picture lies between BOI and EOI. It is whole if it has as many image ids as a picture, and nothing else.
    """
    code_of = {token: code for code, token in enumerate(processor.code_ids)}
    piece, drawing = [], False
    for token in ids:
        if not drawing and token == processor.boi_id:
            if piece:
                yield piece
            piece, drawing = [], True
        elif drawing and token == processor.eoi_id:
            codes = tuple(code_of.get(each, -1) for each in piece)
            yield codes if len(codes) == processor.num_image_tokens and -1 not in codes else None
            piece, drawing = [], False
        else:
            piece.append(token)
    if drawing:
        yield None
    elif piece:
        yield piece


def detokenize(processor: ChameleonProcessor, ids: Iterable[int]) -> tuple[str, list[tuple[int, ...] | None]]:
    """Ids as the original's detokenizer reads them.

    Returns:
        `tuple`: the text without special tokens, with `<image_k>` for picture k, counted from 0 with those of the
        prompt, and `<invalid_image_k>` where it is not whole; and each picture's codes, None for those.
    """
    text, pictures = "", []
    for piece in pieces(processor, ids):
        if isinstance(piece, list):
            text += processor.decode_words(piece)
        else:
            text += mark(len(pictures), piece is not None)
            pictures.append(piece)
    return text, pictures


def mark(k: int, whole: bool = True) -> str:
    """What the detokenizer's text has in the place of picture k."""
    return f"<{'' if whole else 'invalid_'}image_{k}>"


def image_name(sample: int, k: int) -> str:
    """The detokenizer's name of a sample's picture k, inside the output folder."""
    return f"{sample}/image_{k}.png"


def read_decoded(path: str | Path) -> list[dict]:
    """Lines of `decoded_results.jsonl`: `DECODED`, with None in `image_paths` for pictures that are not whole.

    What else a line holds is kept.

    Raises:
        BadRecord: a line of another form, or a picture outside the file's folder; the message says `FILE:LINE`.
    """
    rows, path = [], Path(path)
    # Not splitlines: a model may say other line ends, such as U+2028, which JSON does not escape.
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            kinds = [type(row[name]) for name in DECODED]
        except (ValueError, KeyError, TypeError, RecursionError):
            kinds = []
        if kinds != [int, str, list]:
            expected = f"a number, a text and a list as {', '.join(DECODED)}"
            raise BadRecord(f"{where}: found {line:.60}; expected {expected}.")
        for name in row["image_paths"]:
            if name is not None:
                inside(path.parent, name, f"{where}: image_paths")
        rows.append(row)
    return rows


def write_lines(path: str | Path, rows: Iterable[dict]) -> None:
    """JSON lines, whole or not there."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
