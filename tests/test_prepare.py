import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from picture_pairs import noise, pairs
from PIL import Image

from thinkclearly.data import encode, prepare, sources
from thinkclearly.data.jsonl import read_jsonl, write_jsonl
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.data.sources import BadRecord, read_example
from thinkclearly.images import Letterbox
from thinkclearly.models.janus.model import Janus
from thinkclearly.models.load import load_checkpoint

K, N, GRID = 128, 36, 6


@pytest.fixture(scope="module")
def checkpoint(golden):
    return load_checkpoint(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        return sources.shapes(6, 48, seed=3)


@pytest.fixture(scope="module")
def prepared(rows, checkpoint, tmp_path_factory):
    return prepare_dataset(rows, checkpoint, tmp_path_factory.mktemp("prepared"), batch_size=4)


def same(a, b):
    return a.column_names == b.column_names and a.with_format(None)[:] == b.with_format(None)[:]


# What is stored


def test_columns(rows, prepared):
    assert set(prepared.column_names) == {
        "key", "instruction", "source", "input_tokens", "target_tokens", "output_tokens", "pixel_difference",
        "mask_tokens", "origins",
    }  # fmt: skip
    assert prepared["key"][:] == rows["key"][:] and prepared["instruction"][:] == rows["instruction"][:]
    for name in ("input_tokens", "target_tokens", "output_tokens", "pixel_difference", "mask_tokens"):
        assert np.asarray(prepared[name][:]).shape == (len(rows), N)
    assert 0 <= np.min(prepared["output_tokens"][:]) and np.max(prepared["output_tokens"][:]) == K
    assert [row["bytes"] for row in prepared["source"]] == [row["bytes"] for row in rows["source"]]


def test_the_codes_are_those_of_the_letterboxed_pictures(rows, prepared, checkpoint):
    examples = [read_example(row) for row in rows]
    assert len({example.source.size for example in examples}) > 1
    for side, column in (("source", "input_tokens"), ("target", "target_tokens")):
        squares = [Letterbox(*getattr(e, side).size, 96).fit(getattr(e, side)) for e in examples]
        tokens = checkpoint.token_model.encode(checkpoint.processor.pixel_values(squares))
        assert torch.equal(torch.tensor(prepared[column][:]), tokens)


def test_differences_and_masks_are_patches_of_the_square(tmp_path, checkpoint):
    source, mask = noise(0, 96, 96), Image.new("L", (96, 96))
    target = source.copy()
    target.paste((0, 0, 0), (16, 32, 32, 48))
    mask.paste(255, (16, 32, 48, 48))
    row = prepare_dataset(pairs(tmp_path / "data", (source, target, mask)), checkpoint, tmp_path / "prepared")[0]
    difference, touched = (
        np.reshape(row["pixel_difference"], (GRID, GRID)),
        np.reshape(row["mask_tokens"], (GRID, GRID)),
    )
    assert difference[2, 1] == np.asarray(source)[32:48, 16:32].max() and np.count_nonzero(difference) == 1
    assert np.argwhere(touched).tolist() == [[2, 1], [2, 2]]


def test_pictures_of_files_are_stored_with_the_codes(tmp_path, checkpoint):
    data = pairs(tmp_path / "data", (noise(0), noise(1), None))
    stored = prepare_dataset(data, checkpoint, tmp_path / "prepared")[0]["source"]
    assert stored["bytes"] == (tmp_path / "data/sample_0000/source.png").read_bytes()


# Labels


def test_label_rules(rows, prepared, checkpoint, tmp_path):
    columns = {name: np.asarray(prepared[name][:]) for name in prepared.column_names if "tokens" in name}
    difference = np.asarray(prepared["pixel_difference"][:])
    holds = {
        "tokens": columns["input_tokens"] == columns["target_tokens"],
        "pixels": difference <= 2,
        "mask": ~columns["mask_tokens"],
    }
    assert len({value.tobytes() for value in holds.values()}) == 3
    for rule, clear in holds.items():
        labels = prepare_dataset(rows, checkpoint, tmp_path, clear_label=rule, pixel_tolerance=2)["output_tokens"][:]
        assert np.array_equal(labels, np.where(clear, K, columns["target_tokens"]))
    default = np.where(difference <= 16, K, columns["target_tokens"])
    assert np.array_equal(prepared["output_tokens"][:], default)


def test_another_label_rule_encodes_nothing_anew(rows, prepared, checkpoint, tmp_path, small_shards, encoded_pictures):
    first = prepare_dataset(rows, checkpoint, tmp_path, batch_size=4)
    again = prepare_dataset(rows, checkpoint, tmp_path, batch_size=4, clear_label="tokens")
    assert encoded_pictures == [4, 4, 4]
    assert same(first.remove_columns("output_tokens"), again.remove_columns("output_tokens"))
    assert same(first, prepared)


@pytest.mark.parametrize("rule", ["tokens", "pixels", "mask"])
def test_nothing_changed_is_all_clear(rule, tmp_path, checkpoint):
    data = pairs(tmp_path / "data", (noise(0), noise(0), Image.new("L", (50, 40))))
    labels = prepare_dataset(data, checkpoint, tmp_path / "prepared", clear_label=rule)["output_tokens"][0]
    assert labels == [K] * N


def test_the_mask_rule_needs_masks(tmp_path, checkpoint):
    data = pairs(tmp_path / "data", (noise(0), noise(1), Image.new("L", (50, 40))), (noise(2), noise(3), None))
    assert len(prepare_dataset(data, checkpoint, tmp_path / "prepared")) == 2
    with pytest.raises(BadRecord, match="sample_0001 has no mask"):
        prepare_dataset(data, checkpoint, tmp_path / "prepared", clear_label="mask")


def test_an_unknown_label_rule(rows, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="clear_label='colour'; choose from tokens, pixels, mask"):
        prepare_dataset(rows, checkpoint, tmp_path, clear_label="colour")


def test_a_target_of_another_shape_than_its_source_is_a_bad_record(checkpoint, tmp_path):
    turned, cropped = noise(3, 40, 50), noise(3, 50, 38)
    data = pairs(tmp_path / "data", (noise(0), noise(1), None), (noise(2), turned, None), (noise(2), cropped, None))
    with pytest.raises(BadRecord, match="sample_0001: the source is 50x40, the target 40x50: of another shape"):
        prepare_dataset(data, checkpoint, tmp_path / "prepared")
    left = prepare_dataset(data, checkpoint, tmp_path / "prepared", on_bad_record="skip")
    assert left["key"][:] == ["sample_0000"]


def test_a_target_whose_size_was_rounded_lies_patch_over_patch(checkpoint, tmp_path):
    """As editors do that work in multiples of 16: 500 x 375 comes back as 512 x 384, or as 512 x 376."""
    source = Image.linear_gradient("L").resize((500, 375)).convert("RGB")
    for size in ((1000, 750), (512, 376), (512, 392)):
        data = pairs(tmp_path / f"{size}", (source, source.resize(size), None))
        row = prepare_dataset(data, checkpoint, tmp_path / f"prepared {size}")[0]
        assert max(row["pixel_difference"]) <= 4


# Elsewhere


def test_jsonl_round_trip(prepared, tmp_path):
    assert write_jsonl(prepared, tmp_path / "data.jsonl", K) == len(prepared)
    back, skipped = read_jsonl(tmp_path / "data.jsonl", K, N)
    assert skipped == []
    assert same(back, prepared.select_columns(back.column_names))
    first = json.loads((tmp_path / "data.jsonl").read_text().splitlines()[0])
    assert first["output_tokens"].count("<CLEAR>") == prepared[0]["output_tokens"].count(K) > 0


def test_two_processes_give_the_same_data(rows, prepared, checkpoint, tmp_path, small_shards, monkeypatch):
    barrier = threading.Barrier(2, timeout=60)
    here = threading.local()

    class TwoProcesses:
        """Two threads that meet as two processes would."""

        num_processes = 2
        process_index = property(lambda self: here.index)
        is_main_process = property(lambda self: here.index == 0)

        def wait_for_everyone(self):
            barrier.wait()

        @contextmanager
        def main_process_first(self):
            if here.index:
                barrier.wait()
            yield
            if not here.index:
                barrier.wait()

    for module in (encode, prepare):
        monkeypatch.setattr(module, "PartialState", TwoProcesses)
    results, encoded, real = {}, {}, Janus.encode

    def counting(janus, pixels):
        encoded[here.index] = encoded.get(here.index, 0) + len(pixels)
        return real(janus, pixels)

    monkeypatch.setattr(Janus, "encode", counting)

    def run(index):
        here.index = index
        results[index] = prepare_dataset(rows, checkpoint, tmp_path)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoded == {0: 8, 1: 4}
    assert same(results[0], prepared) and same(results[1], prepared)
    assert results[0]._fingerprint == results[1]._fingerprint


def test_prepared_sets_can_be_joined_and_split(prepared):
    both = concatenate_datasets([prepared, prepared]).train_test_split(test_size=3, seed=0)
    assert len(both["train"]) == 9 and both["test"].features == prepared.features
