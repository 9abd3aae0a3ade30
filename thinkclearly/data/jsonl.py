"""Prepared records as JSON lines, the original's exchange format: `{instruction, input_tokens, output_tokens}`.

`output_tokens` holds codes and the names of instruction tokens ("<CLEAR>"); in memory those are ids from
`codebook_size` on. `origins`, which is ours and may be missing, tells which records share a picture. With other
instruction tokens than CLEAR `transformed_tokens` holds the codes that each of them stands for, one after the other.
Knows nothing of models or pictures.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence

import datasets
import numpy as np

from thinkclearly.data.groups import token_origins
from thinkclearly.data.sources import BadRecord
from thinkclearly.files import replacing
from thinkclearly.instructions import CLEAR

logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        "instruction": datasets.Value("string"),
        "input_tokens": datasets.List(datasets.Value("int32")),
        "output_tokens": datasets.List(datasets.Value("int32")),
        "origins": datasets.List(datasets.Value("string")),
    }
)
REQUIRED = ("instruction", "input_tokens", "output_tokens")
TRANSFORMED = {"transformed_tokens": datasets.List(datasets.Value("int32"))}


def read_jsonl(
    path: str | os.PathLike,
    codebook_size: int,
    num_tokens: int,
    on_bad_record: str = "error",
    names: Sequence[str] = (CLEAR,),
) -> tuple[datasets.Dataset, list[str]]:
    """Read prepared records and check every one.

    Args:
        codebook_size (`int`): codes are 0 to `codebook_size` - 1.
        num_tokens (`int`): how many tokens `input_tokens` and `output_tokens` must have, 576 for Janus-Pro.
        on_bad_record (`str`, defaults to `"error"`): stop at the first bad line, or `"skip"` it.
        names (`Sequence[str]`, defaults to `("CLEAR",)`): instruction tokens; name i is written `"<NAME>"` and read
            as id `codebook_size + i`.

    Returns:
        `tuple`: a Dataset of instruction (str), input_tokens and output_tokens (int32, `num_tokens` each) and origins
        (str, what tells which records share a picture; made of the tokens where the line has none), where lines have
        them transformed_tokens (int32, `num_tokens` for each name), and one message `FILE:LINE: reason` per skipped
        line.

    Raises:
        BadRecord: a bad line (`FILE:LINE: …`).
        ValueError: an unknown `on_bad_record`, or no usable record.
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record={on_bad_record!r}: expected 'error' or 'skip'.")
    ids = {f"<{name}>": codebook_size + i for i, name in enumerate(names)}
    columns = {name: [] for name in (*FEATURES, *TRANSFORMED)}
    skipped = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = _parse(line, codebook_size, num_tokens, ids)
            except BadRecord as error:
                message = f"{path}:{number}: {error}"
                if on_bad_record == "error":
                    raise BadRecord(message) from error
                skipped.append(message)
                continue
            for name, value in zip(columns, record):
                columns[name].append(value)
    if skipped:
        logger.warning("%s: skipped %d bad lines, the first: %s", path, len(skipped), skipped[0])
    if not columns["instruction"]:
        raise ValueError(f"{path}: no usable record ({len(skipped)} bad lines); expected one JSON object per line.")
    features = FEATURES
    if any(codes is not None for codes in columns["transformed_tokens"]):
        features = datasets.Features({**FEATURES, **TRANSFORMED})
    return datasets.Dataset.from_dict({name: columns[name] for name in features}, features=features), skipped


def _parse(
    line: bytes, codebook_size: int, num_tokens: int, ids: dict[str, int]
) -> tuple[str, np.ndarray, np.ndarray, list[str], np.ndarray | None]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte {error.start}); save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else " The line has no end: was the file cut short?"
        raise BadRecord(f"not a JSON object ({error}).{hint}") from error
    if not isinstance(record, dict):
        raise BadRecord(f"found {type(record).__name__}, expected an object with {', '.join(REQUIRED)}.")
    instruction = record.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise BadRecord(f"'instruction' is {instruction!r:.40}, expected text.")
    try:
        instruction.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"'instruction' holds half a surrogate pair at {error.start}; it is not text.") from error
    source = _tokens(record, "input_tokens", codebook_size, num_tokens, {})
    target = _tokens(record, "output_tokens", codebook_size, num_tokens, ids)
    transformed, copied = None, np.tile(source, len(ids))
    if record.get("transformed_tokens") is not None:
        transformed = copied = _tokens(record, "transformed_tokens", codebook_size, num_tokens * len(ids), {})
    parts, number = np.concatenate([target, copied]).reshape(-1, num_tokens), np.maximum(0, target - codebook_size + 1)
    origins = record.get("origins") or token_origins(source, parts[number, np.arange(num_tokens)])
    if not isinstance(origins, list) or not all(isinstance(name, str) for name in origins):
        raise BadRecord(f"'origins' is {origins!r:.40}, expected a list of names, or none.")
    return instruction, source, target, origins, transformed


def _tokens(record: dict, field: str, codebook_size: int, num_tokens: int, ids: dict[str, int]) -> np.ndarray:
    values = record.get(field)
    if not isinstance(values, list) or len(values) != num_tokens:
        found = f"{len(values)} tokens" if isinstance(values, list) else f"{values!r:.40}"
        raise BadRecord(f"'{field}' is {found}, expected a list of {num_tokens}.")
    tokens = np.empty(num_tokens, np.int32)
    for position, value in enumerate(values):
        token = ids.get(value) if isinstance(value, str) else value
        if type(token) is not int or not (isinstance(value, str) or 0 <= token < codebook_size):
            expected = " or ".join([f"0 to {codebook_size - 1}", *ids])
            raise BadRecord(f"'{field}'[{position}] is {value!r:.40}, expected {expected}.")
        tokens[position] = token
    return tokens


def write_jsonl(
    dataset: datasets.Dataset, path: str | os.PathLike, codebook_size: int, names: Sequence[str] = (CLEAR,)
) -> int:
    """Write records so that `read_jsonl` reads them back; returns how many.

    The file appears under its name only when complete. Raises `ValueError` for an id outside the codes and `names`.
    """
    words = [f"<{name}>" for name in names]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for index, row in enumerate(dataset.with_format(None)):
            line = {name: row[name] for name in (*FEATURES, *TRANSFORMED) if name in row}
            for field, last in (("input_tokens", codebook_size), ("output_tokens", codebook_size + len(words))):
                wrong = [token for token in row[field] if not 0 <= token < last]
                if wrong:
                    raise ValueError(f"record {index}: '{field}' holds {wrong[0]}, expected 0 to {last - 1}.")
            line["output_tokens"] = [
                token if token < codebook_size else words[token - codebook_size] for token in row["output_tokens"]
            ]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(dataset)
