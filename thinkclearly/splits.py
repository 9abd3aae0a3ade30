"""The data that a job's options name: photo pairs in training and held-out splits, tokenized.

Knows every source. Does not know what the records are for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from accelerate import PartialState
from datasets import Dataset

from thinkclearly.config import DataArguments
from thinkclearly.data import sources
from thinkclearly.data.jsonl import read_jsonl
from thinkclearly.data.magicbrush import magicbrush
from thinkclearly.data.prepare import label_dataset, load_encoded, prepare_dataset
from thinkclearly.hub.publish import pull_dataset
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.backbone import Backbone


@dataclass
class PreparedData:
    """Tokenized splits, and the pictures that the held-out one came from, where there are any."""

    train: Dataset | None
    test: Dataset | None
    test_rows: Dataset | None


def read_rows(data: DataArguments, train: bool = True) -> tuple[Dataset | None, Dataset | None]:
    """Photo pairs for training (unless that is off) and evaluation, from the source that the options name."""
    if data.source == "shapes":
        options = {"size": data.shapes_size, "seed": data.split_seed, "photos_folder": data.photos_folder}
        test = sources.shapes(data.eval_samples, split="test", **options) if data.eval_samples else None
        return sources.shapes(data.limit or 2000, **options) if train else None, test
    if data.source == "magicbrush":
        rows = magicbrush(
            data.path or "osunlp/MagicBrush",
            split=data.split,
            include=data.include,
            exclude=data.exclude,
            match=data.match,
            turn_index=data.turn_index,
            shuffle_seed=data.split_seed if data.shuffle else None,
            limit=data.limit,
            streaming=data.streaming,
        )
        if data.streaming:
            rows = Dataset.from_list(list(rows), features=sources.FEATURES)
    else:
        rows = sources.folder(data.path) if data.source == "folder" else sources.sharegpt4o(data.path)
        rows = limit_rows(rows, data)
    train_rows, test_rows = split_rows(rows, data)
    return train_rows if train else None, test_rows


def limit_rows(rows: Dataset, data: DataArguments) -> Dataset:
    """The first `limit` records, shuffled before where that is asked for."""
    rows = rows.shuffle(seed=data.split_seed) if data.shuffle else rows
    return rows.select(range(min(data.limit, len(rows)))) if data.limit else rows


def split_rows(rows: Dataset, data: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Holds `eval_samples` records out."""
    if not data.eval_samples:
        return rows, None
    if data.eval_samples >= len(rows):
        raise ValueError(
            f"eval_samples={data.eval_samples} of {len(rows)} records leaves none to train on; lower it or add data"
        )
    parts = rows.train_test_split(test_size=data.eval_samples, seed=data.split_seed)
    return parts["train"], parts["test"]


def build_data(data: DataArguments, backbone: Backbone, train: bool = True) -> PreparedData:
    """Reads, tokenizes and labels; what was prepared before is found again.

    Args:
        train: off, pictures are tokenized for the held-out split only.
    """
    if data.source == "jsonl":
        codes, tokens = backbone.model.config.vq_config.num_embeddings, backbone.processor.num_image_tokens
        rows, _ = read_jsonl(data.path, codes, tokens, on_bad_record=data.on_bad_record)
        rows = rows.add_column("key", [f"{data.path}[{i}]" for i in range(len(rows))])
        return PreparedData(*split_rows(rows, data), None)
    state = PartialState()
    if data.source == "prepared":
        with state.main_process_first():
            encoded = limit_rows(load_encoded(pull_dataset(data.path), backbone), data)
            vocabulary = InstructionVocabulary(backbone.model.config.vq_config.num_embeddings)
            rows = label_dataset(encoded, data.clear_label, data.pixel_tolerance, vocabulary)
        return PreparedData(*split_rows(rows, data), None)
    with state.main_process_first():
        parts = read_rows(data, train)
    options = {
        "clear_label": data.clear_label,
        "pixel_tolerance": data.pixel_tolerance,
        "batch_size": data.prepare_batch_size,
        "on_bad_record": data.on_bad_record,
        "workers": data.prepare_workers,
    }
    backbone.model.model.vqmodel.to(state.device)
    prepare = partial(prepare_dataset, backbone=backbone, directory=data.prepared_dir, **options)
    return PreparedData(*(None if rows is None else prepare(rows) for rows in parts), parts[1])
