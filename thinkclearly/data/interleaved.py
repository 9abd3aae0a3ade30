"""Thoughts to token streams: words and pictures of a record in one line of ids, as TwGI is trained on.

Reads the original's JSON lines and encodes pictures as every other kind of data is. Knows no losses, and no family
beyond a processor whose words and codes share one vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets
from PIL import Image

from thinkclearly.data.encode import Layout, Record, encode_dataset, picture_fingerprint
from thinkclearly.data.options import DataArguments
from thinkclearly.data.prepare import MAX_STRETCH, unchanged
from thinkclearly.data.samples import captioned_pictures
from thinkclearly.data.sources import BadRecord, dataset_of_files, inside, text_of
from thinkclearly.data.splits import (
    SHAPES,
    PreparedData,
    encoding,
    read_rows,
    select_rows,
    split_records,
    tokenizer_to_device,
)
from thinkclearly.data.thoughts import IMAGE, THOUGHTS, from_captions, from_edits, thought_rows
from thinkclearly.images import ImageError, load_photo, patch_difference
from thinkclearly.models.chameleon.processor import TEMPLATES, ChameleonProcessor
from thinkclearly.models.load import Checkpoint

logger = logging.getLogger(__name__)

READ = Features({**THOUGHTS, "tokens": List(Value("int32"))})
ENCODED = Features(
    {
        "key": Value("string"),
        "input_ids": List(Value("int32")),
        "prompt_ids": List(Value("int32")),
        "response_start": Value("int32"),
        "picture_starts": List(Value("int32")),
        "edit_of": List(Value("int32")),
        "scene": Value("string"),
        "codes": List(Value("int32")),
        "pixel_difference": List(Value("uint8")),
        "other_tokens": Value("bool"),
        "origins": List(Value("string")),
    }
)
STREAMS = Features({"input_ids": List(Value("int32")), "copied": List(Value("bool"))})


def read_thoughts(path: str | os.PathLike, on_bad_record: str = "error") -> Dataset:
    """Records of a JSON-lines file, as
    [TwGI](https://github.com/GAIR-NLP/thinking-with-generated-images)'s `dataset_example.jsonl` has them.

    `prompt` are the words that the model is told, `response` what it is to say, with `<image>` where it is to draw,
    and `images` the paths of those pictures in order, relative to the file. `tokens`, ids that somebody else made, are
    compared and not used. Ours are `edit_of`, for each picture the number of the earlier one that it is an edit of or
    -1, `given`, how many pictures at the beginning are shown and not taught, `scene` and `key`.

    Args:
        on_bad_record: "error" stops at a bad line, "skip" leaves it out and logs how many.

    Returns:
        `THOUGHTS` and `tokens`; a key is `FILE:line` where the record brings none.

    Raises:
        BadRecord: a bad line, by file and number.
        ValueError: no usable record.
    """
    path, rows, skipped = Path(path), [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(_thought_of_line(line, f"{path.name}:{number}", path.parent))
            except BadRecord as error:
                if on_bad_record == "error":
                    raise
                skipped.append(str(error))
    if skipped:
        logger.warning("%s: skipped %d bad lines, the first: %s", path, len(skipped), skipped[0])
    if not rows:
        raise ValueError(f"{path}: no usable record ({len(skipped)} bad lines); expected one JSON object per line.")
    return dataset_of_files(rows, READ)


def _thought_of_line(line: bytes, where: str, root: Path) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else " The line has no end: was the file cut short?"
        raise BadRecord(f"{where}: not a JSON object in UTF-8 ({error}).{hint}") from error
    if not isinstance(record, dict):
        raise BadRecord(
            f"{where}: found {type(record).__name__}, expected an object with prompt, response and images."
        )
    lists = {name: record.get(name) or [] for name in ("images", "edit_of", "tokens")}
    for name, value in lists.items():
        kind = str if name == "images" else int
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise BadRecord(f"{where}: '{name}' is {value!r:.60}, expected a list of {kind.__name__}.")
    scene = record.get("scene") or ""
    return {
        "key": text_of(record.get("key"), where, "key") or where,
        "prompt": text_of(record.get("prompt"), where, "prompt"),
        "response": text_of(record.get("response"), where, "response"),
        "images": [{"path": str(inside(root, name, f"{where}: images")), "bytes": None} for name in lists["images"]],
        "edit_of": lists["edit_of"],
        "given": _given(record, where, len(lists["images"])),
        "scene": scene if isinstance(scene, str) else json.dumps(scene),
        "tokens": lists["tokens"],
    }


def _given(record: dict, where: str, pictures: int) -> int:
    given = record.get("given") or 0
    if type(given) is not int or not 0 <= given <= pictures:
        raise BadRecord(f"{where}: 'given' is {given!r:.60}, expected how many of its {pictures} pictures are given.")
    return given


def with_template(rows: Dataset, mode: str) -> Dataset:
    """Raw prompts in the words that the original asks a `mode` with, one of `TEMPLATES`."""
    if mode == "general":
        return rows
    prompts = [TEMPLATES[mode].replace("{p}", prompt) for prompt in rows["prompt"]]
    return rows.remove_columns("prompt").add_column("prompt", prompts)


def build_thoughts(data: DataArguments, checkpoint: Checkpoint, calibration: bool = False) -> PreparedData:
    """Reads, tokenizes and splits streams of words and pictures; no prompt and no picture is in two parts.

    Of photo pairs, the source is the picture that is criticised, and of captioned pictures, each is drawn at once.

    Args:
        calibration: whether records are to be held out for the gate.

    Raises:
        ValueError: a source without words and pictures, or another family than Chameleon.
    """
    data = data if calibration else replace(data, calibration_edits=0)
    tokenizer_to_device(checkpoint)
    tokenize = partial(
        tokenize_thoughts,
        checkpoint=checkpoint,
        directory=data.prepared_dir,
        clear_label=data.clear_label,
        pixel_tolerance=data.pixel_tolerance,
        max_stream=data.max_stream,
        **encoding(data),
    )
    if data.source == "shapes":
        return _build_shape_thoughts(data, tokenize)
    with PartialState().main_process_first():
        rows = _thoughts_of_source(data)
    streams, left_out = tokenize(rows)
    with PartialState().main_process_first():
        return replace(split_records(streams, None, data), left_out=left_out)


def _thoughts_of_source(data: DataArguments) -> Dataset:
    if data.source == "thoughts":
        rows = select_rows(read_thoughts(data.path, data.on_bad_record), data)
        return with_template(rows, *(data.thought_mode or ["general"]))
    if data.source == "captions":
        return from_captions(select_rows(captioned_pictures(data.path), data))
    if data.source in ("magicbrush", "folder", "sharegpt4o"):
        return with_template(from_edits(read_rows(data)), "critique")
    known = "thoughts, shapes, captions, magicbrush, folder or sharegpt4o"
    raise ValueError(f"source: {data.source} has no words and pictures in turn; --method interleaved reads {known}")


def _build_shape_thoughts(data: DataArguments, tokenize: Callable[[Dataset], tuple[Dataset, int]]) -> PreparedData:
    """As many of each kind; the generator makes any number for every part, so nothing needs to be held out."""
    if data.photos_folder or data.pair_shapes:
        raise ValueError(
            "source: shapes draws thoughts on plain backgrounds: photos_folder and pair_shapes mean nothing"
        )
    counts = {"train": data.limit or SHAPES, "calibration": data.calibration_edits, "test": data.eval_samples}
    found, modes = PreparedData(), data.thought_mode or ["critique"]
    options = {"seed": data.split_seed, "size": data.shapes_size, "wrong": data.wrong_share}
    for part in [part for part, count in counts.items() if count]:
        with PartialState().main_process_first():
            shares = [len(range(i, counts[part], len(modes))) for i in range(len(modes))]
            made = [with_template(thought_rows(m, n, part, **options), m) for m, n in zip(modes, shares) if n]
            rows = concatenate_datasets(made)
        streams, left_out = tokenize(rows)
        setattr(found, part, streams)
        found.left_out += left_out
    return found


def tokenize_thoughts(
    rows: Dataset,
    checkpoint: Checkpoint,
    directory: str | Path,
    *,
    clear_label: str = "pixels",
    pixel_tolerance: int = 16,
    max_stream: int | None = None,
    **options,
) -> tuple[Dataset, int]:
    """Token streams of thoughts; what was encoded before is found again.

    A stream is BOS, prompt, SEP, response and EOS. A picture is BOI, the ids of its N codes, and EOI. Where an edited
    picture is unchanged it has the source's ids: the tokenizer looks beyond its patch, and what an edit leaves alone
    comes back as other codes, which say nothing.

    Args:
        rows: columns of `THOUGHTS`, and `tokens` or not.
        directory, options: see `encode_dataset`.
        clear_label: what is unchanged. `"tokens"`: the codes are the same; `"pixels"`: no channel of the patch's
            pixels differs by more than `pixel_tolerance`, of 255.
        max_stream: streams of this many tokens or more are left out, and counted in the log.

    Returns:
        The streams, and how many were left out. Columns: `key`, `input_ids`, `prompt_ids` (the bare prompt, without
        the original's template), `response_start` (index of the
        first id that is taught), `picture_starts` (index of the first id of each of P pictures),
        `edit_of` (P), `copied` (P·N, the unchanged patches of edits), `scene` and `origins` (fingerprints of the
        pictures, and the prompt: records that share one are never split).

    Raises:
        BadRecord: a record that cannot be used, by its key; with `on_bad_record="skip"` it is listed instead.
        ValueError: the family has no stream of words and pictures, or no record is short enough.
    """
    processor = checkpoint.processor
    if not isinstance(processor, ChameleonProcessor):
        raise ValueError(
            "Words and pictures in one stream need a model whose words and codes share one vocabulary: Chameleon, "
            "Anole, TwGI or tiny_chameleon as base_model."
        )
    if clear_label == "mask":
        raise ValueError("clear_label=mask: thoughts have no masks; use pixels or tokens")
    words = hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    layout = Layout(ENCODED, partial(_read_thought, processor=processor), also=words)
    encoded = encode_dataset(rows, checkpoint, directory, layout, **options)
    if differing := sum(encoded["other_tokens"]):
        logger.warning(
            "%d of %d records bring `tokens` whose words differ from what the tokenizer makes of prompt and response; "
            "they are not used",
            *(differing, len(encoded)),
        )
    n, code_ids = processor.num_image_tokens, np.asarray(processor.code_ids, np.int32)
    streams = _streams(encoded, code_ids, n, clear_label, pixel_tolerance)
    if max_stream is None:
        return streams, 0
    lengths = np.array([len(ids) for ids in streams.with_format("numpy")["input_ids"]])
    kept = np.flatnonzero(lengths < max_stream)
    if len(kept) < len(lengths):
        logger.warning(
            "%d of %d records have max_stream=%d tokens or more, %d at most, and are left out",
            *(len(lengths) - len(kept), len(lengths), max_stream, lengths.max()),
        )
    if not len(kept):
        raise ValueError(f"max_stream={max_stream}: every record is longer, {lengths.min()} tokens at least; raise it")
    return streams.select(kept), len(lengths) - len(kept)


def _streams(encoded: Dataset, code_ids: np.ndarray, n: int, rule: str, tolerance: int) -> Dataset:
    """Puts the pictures' ids in their places."""

    def fill(row: dict) -> dict:
        ids, starts = np.asarray(row["input_ids"]).copy(), row["picture_starts"]
        codes = np.asarray(row["codes"]).reshape(-1, n).copy()
        difference = np.asarray(row["pixel_difference"]).reshape(codes.shape)
        copied = np.zeros(codes.shape, bool)
        for number, source in enumerate(row["edit_of"]):
            if source >= 0:
                pair = {"input_tokens": codes[source], "target_tokens": codes[number]}
                copied[number] = unchanged(pair | {"pixel_difference": difference[number]}, rule, tolerance)
                codes[number] = np.where(copied[number], codes[source], codes[number])
            ids[starts[number] : starts[number] + n] = code_ids[codes[number]]
        return {"input_ids": ids, "copied": copied.ravel()}

    needed = encoded.select_columns(["input_ids", "picture_starts", "edit_of", "codes", "pixel_difference"])
    made = needed.with_format("numpy").map(fill, remove_columns=needed.column_names, features=STREAMS, desc="streams")
    rest = encoded.remove_columns(["input_ids", "codes", "pixel_difference", "other_tokens"])
    return concatenate_datasets([rest, made.with_format(None)], axis=1)


def _read_thought(row: Mapping, size: int, grid: int, processor: ChameleonProcessor) -> Record:
    """Runs in workers, as `Layout.read`. Ids of pictures stay `image_id` until the codes are known."""
    key, prompt, n = row["key"], row["prompt"], grid**2
    if not prompt.strip() or IMAGE in prompt:
        raise BadRecord(f"{key}: the prompt is {prompt!r:.60}, expected words without {IMAGE}.")
    pieces = row["response"].split(IMAGE)
    if len(pieces) - 1 != len(row["images"]):
        raise BadRecord(f"{key}: {len(pieces) - 1} {IMAGE} in the response, but {len(row['images'])} images.")
    if len(pieces) == 1 and not pieces[0].strip():
        raise BadRecord(f"{key}: the response is empty; expected words or {IMAGE}.")
    edit_of = row["edit_of"] or [-1] * len(row["images"])
    if len(edit_of) != len(row["images"]) or not all(-1 <= e < i for i, e in enumerate(edit_of)):
        raise BadRecord(f"{key}: edit_of is {edit_of}, expected for each picture an earlier one's number or -1.")
    ids = [*processor.encode_words(prompt, bos=True), processor.sep_id]
    start, starts = len(ids), []
    for number, piece in enumerate(pieces):
        ids += processor.encode_words(piece, bos=False)
        if number < len(row["images"]):
            starts.append(len(ids) + 1)
            ids += [processor.boi_id, *[processor.image_id] * n, processor.eoi_id]
    ids.append(processor.eos_id)
    if row["given"]:  # what stands before is shown, and carries no loss
        start = starts[row["given"] - 1] + n + 1
    _check_words(key, ids, starts, n, processor)
    pictures, squares = _squares(row, edit_of, processor)
    differences = [
        np.full(n, 255, np.uint8) if source < 0 else patch_difference(squares[source], square, grid).ravel()
        for source, square in zip(edit_of, squares)
    ]
    columns = {
        "key": key,
        "input_ids": ids,
        "prompt_ids": processor.encode_words(_bare(prompt), bos=False),
        "response_start": start,
        "picture_starts": starts,
        "edit_of": edit_of,
        "scene": row["scene"],
        "pixel_difference": np.concatenate([np.zeros(0, np.uint8), *differences]),
        "other_tokens": bool(row.get("tokens")) and _words(row["tokens"], processor) != _words(ids, processor),
        "origins": [f"prompt {prompt}", *map(picture_fingerprint, pictures)],
    }
    return Record(columns, squares, {"codes": list(range(len(squares)))})


def _squares(
    row: Mapping, edit_of: list[int], processor: ChameleonProcessor
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The pictures as they are, and in the model's square. Edits must have their source's shape."""
    try:
        pictures = [load_photo(image, f"{row['key']}: picture {i}") for i, image in enumerate(row["images"], 1)]
    except ImageError as error:
        raise BadRecord(str(error)) from error
    for picture, source in zip(pictures, edit_of):
        (w, h), (sw, sh) = picture.size, pictures[source].size
        if source >= 0 and not 1 / MAX_STRETCH <= (w * sh) / (h * sw) <= MAX_STRETCH:
            raise BadRecord(
                f"{row['key']}: a picture of {w}x{h} is an edit of one of {sw}x{sh}: of another shape, so their "
                "patches do not show the same. Crop one of them, or say -1 in edit_of."
            )
    return pictures, list(map(processor.square, pictures))


def _check_words(key: str, ids: list[int], starts: list[int], n: int, processor: ChameleonProcessor) -> None:
    """Refuses words that hold control tokens: a stream has one SEP, and pictures stand where `images` has one."""
    control = {processor.sep_id: 1, processor.bos_id: 1, processor.eos_id: 1, processor.pad_id: 0}
    control |= {processor.boi_id: len(starts), processor.eoi_id: len(starts), processor.image_id: n * len(starts)}
    control |= dict.fromkeys(set(ids) & set(processor.code_ids), 0)
    for token, expected in control.items():
        if (found := ids.count(token)) != expected:
            name = processor.tokenizer.convert_ids_to_tokens(token)
            raise BadRecord(f"{key}: the words hold {found - expected} times {name!r}, a control token; remove it.")


def _words(ids: list[int], processor: ChameleonProcessor) -> list[int]:
    """Without codes, which another encoder may find in another way."""
    codes = {processor.image_id, *processor.code_ids}
    return [token for token in ids if token not in codes]


def _bare(prompt: str) -> str:
    """A prompt without the original's template."""
    openings = [template.removesuffix("{p}") for mode, template in TEMPLATES.items() if mode != "general"]
    return next((prompt.removeprefix(opening) for opening in openings if prompt.startswith(opening)), prompt)
