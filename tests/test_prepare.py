import json
import multiprocessing
import os
import threading
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import torch
from datasets import concatenate_datasets
from PIL import Image

from thinkclearly.data import prepare, sources
from thinkclearly.data.encode import INFO_FILE, load_encoded
from thinkclearly.data.jsonl import read_jsonl, write_jsonl
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.data.sources import BadRecord, EditExample, read_example, write_folder
from thinkclearly.images import Letterbox
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


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_SIZE", 2)


@pytest.fixture
def encoded_pictures(monkeypatch):
    """How many pictures each call of the encoder was given."""
    calls = []

    def counting(janus, pixels):
        calls.append(len(pixels))
        return encode_tokens(janus, pixels)

    monkeypatch.setattr(prepare, "encode_tokens", counting)
    return calls


def noise(seed, width=50, height=40):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pairs(path, *examples):
    """A folder source with one sample per (source, target, mask)."""
    write_folder((EditExample(s, t, f"edit {i}", m) for i, (s, t, m) in enumerate(examples)), path)
    return sources.folder(path)


def shards(directory):
    (folder,) = directory.iterdir()
    return sorted(path for path in folder.iterdir() if path.is_dir())


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


def test_unknown_choices(rows, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="clear_label='colour'; choose from tokens, pixels, mask"):
        prepare_dataset(rows, checkpoint, tmp_path, clear_label="colour")
    with pytest.raises(ValueError, match="on_bad_record='ignore'; choose 'error' or 'skip'"):
        prepare_dataset(rows, checkpoint, tmp_path, on_bad_record="ignore")


# Found again


def test_shards_are_encoded_once(rows, prepared, checkpoint, tmp_path, small_shards, encoded_pictures):
    first = prepare_dataset(rows, checkpoint, tmp_path, batch_size=4)
    assert encoded_pictures == [4, 4, 4] and len(shards(tmp_path)) == 3
    again = prepare_dataset(rows, checkpoint, tmp_path, batch_size=4, clear_label="tokens")
    assert encoded_pictures == [4, 4, 4]
    assert same(first.remove_columns("output_tokens"), again.remove_columns("output_tokens"))
    assert same(first, prepared)


def test_an_interrupted_run_goes_on(rows, prepared, checkpoint, tmp_path, small_shards, encoded_pictures):
    prepare_dataset(rows, checkpoint, tmp_path)
    done, lost = shards(tmp_path)[0], shards(tmp_path)[1]
    stamp = (done / "state.json").stat().st_mtime_ns
    # As a killed run leaves it: half a folder under a temporary name.
    left = lost.rename(lost.with_name(f".{lost.name}.0123.tmp"))
    (left / "data-00000-of-00001.arrow").write_bytes(b"half")
    os.utime(left, (0, 0))
    encoded_pictures.clear()
    assert same(prepare_dataset(rows, checkpoint, tmp_path), prepared)
    assert encoded_pictures == [4]
    assert not list(tmp_path.rglob("*.tmp"))
    assert (done / "state.json").stat().st_mtime_ns == stamp


def test_a_failed_run_leaves_whole_shards_only(tmp_path, checkpoint, small_shards, encoded_pictures):
    data = pairs(tmp_path / "data", *[(noise(i), noise(i + 9), None) for i in range(4)])
    (tmp_path / "data/sample_0003/target.png").write_bytes(b"broken")
    with pytest.raises(BadRecord, match="sample_0003"):
        prepare_dataset(data, checkpoint, tmp_path / "prepared")
    assert [path.name for path in shards(tmp_path / "prepared")] == ["shard-00000-of-00002"]
    encoded_pictures.clear()
    assert len(prepare_dataset(data, checkpoint, tmp_path / "prepared", on_bad_record="skip")) == 3
    assert encoded_pictures == [2]


def test_another_codebook_is_refused(rows, golden, tmp_path):
    checkpoint = load_checkpoint(str(golden / "checkpoint"))
    prepare_dataset(rows, checkpoint, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(load_encoded(folder, checkpoint)) == len(rows)
    with torch.no_grad():
        checkpoint.network.model.vqmodel.quantize.embedding.weight[0] += 1.0
    with pytest.raises(ValueError, match="was prepared with codebook_hash=.*Prepare the data again"):
        load_encoded(folder, checkpoint)
    prepare_dataset(rows, checkpoint, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_preparation_file(rows, prepared, checkpoint, tmp_path):
    prepare_dataset(rows, checkpoint, tmp_path)
    (folder,) = tmp_path.iterdir()
    info = json.loads((folder / INFO_FILE).read_text())
    assert len(info.pop("codebook_hash")) == 16
    assert info == {
        "codebook_size": K, "image_size": 96, "num_image_tokens": N, "dtype": "float32", "records": 6, "skipped": [],
    }  # fmt: skip


def test_of_two_runs_that_prepare_the_same_data_one_finds_what_the_other_wrote(
    rows, prepared, checkpoint, tmp_path, small_shards, monkeypatch
):
    calls, results = [], []

    def interrupted(janus, pixels):
        """In the middle of the first shard another run comes and goes."""
        calls.append(len(pixels))
        if len(calls) == 1:
            results.append(prepare_dataset(rows, checkpoint, tmp_path))
        return encode_tokens(janus, pixels)

    monkeypatch.setattr(prepare, "encode_tokens", interrupted)
    results.append(prepare_dataset(rows, checkpoint, tmp_path))
    assert all(same(result, prepared) for result in results)
    assert len(calls) == 1 + 3  # the shard that had begun, and all three of the other run
    assert not list(tmp_path.rglob("*.tmp"))


# Batches and workers


def test_batches_and_workers_change_nothing(rows, prepared, checkpoint, tmp_path, small_shards):
    examples = [read_example(row) for row in rows]
    alone = [
        checkpoint.token_model.encode(checkpoint.processor.pixel_values([Letterbox(*e.source.size, 96).fit(e.source)]))
        for e in examples
    ]
    assert torch.equal(torch.cat(alone), torch.tensor(prepared["input_tokens"][:]))
    before = torch.get_rng_state()
    for workers, batch_size in ((0, 1), (2, 1), (2, 2)):
        directory = tmp_path / f"{workers}, {batch_size}"
        assert same(prepare_dataset(rows, checkpoint, directory, batch_size=batch_size, workers=workers), prepared)
    assert torch.equal(torch.get_rng_state(), before)  # what is trained next must not depend on it
    with pytest.raises(ValueError, match="num_workers"):
        prepare_dataset(rows, checkpoint, tmp_path / "-1", workers=-1)


def test_a_picture_is_encoded_once_in_a_shard(tmp_path, checkpoint, encoded_pictures):
    turns = [(noise(0), noise(1), None), (noise(1), noise(2), None), (noise(2), noise(2), None)]
    session = prepare_dataset(pairs(tmp_path / "data", *turns), checkpoint, tmp_path / "once", batch_size=2)
    assert encoded_pictures == [3]
    single = [
        prepare_dataset(pairs(tmp_path / f"{i}", turn), checkpoint, tmp_path / "each") for i, turn in enumerate(turns)
    ]
    for name in ("input_tokens", "target_tokens", "output_tokens"):
        assert session[name][:] == [one[name][0] for one in single]


def test_workers_end_with_a_killed_run(rows, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "encode_tokens", lambda janus, pixels: time.sleep(60))
    options = {"batch_size": 1, "workers": 2}
    run = multiprocessing.get_context("fork").Process(
        target=prepare_dataset, args=(rows, checkpoint, tmp_path), kwargs=options
    )
    run.start()
    try:
        give_up = time.monotonic() + 20
        while len(workers := psutil.Process(run.pid).children()) < 2 and time.monotonic() < give_up:
            time.sleep(0.05)
        time.sleep(0.5)  # until they have read ahead as far as they may, and wait
    finally:
        run.kill()
        run.join()
    assert len(workers) == 2
    left = psutil.wait_procs(workers, timeout=10)[1]
    for worker in left:
        worker.kill()
    assert left == []


# Bad records


@pytest.fixture
def flawed(tmp_path):
    data = tmp_path / "data"
    pairs(data, *[(noise(i), noise(i + 9), None) for i in range(5)])
    (data / "sample_0001/source.png").write_bytes(b"not a picture")
    (data / "sample_0002/metadata.json").write_text(json.dumps({"instruction": " "}))
    (data / "sample_0004/target.png").unlink()
    return sources.folder(data)


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


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_stops(workers, flawed, checkpoint, tmp_path):
    with pytest.raises(BadRecord, match="^sample_0001: source .*source.png"):
        prepare_dataset(flawed, checkpoint, tmp_path / "prepared", batch_size=1, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_skipped_and_listed(workers, flawed, checkpoint, tmp_path, caplog, small_shards):
    dataset = prepare_dataset(flawed, checkpoint, tmp_path / "prepared", on_bad_record="skip", workers=workers)
    assert dataset["key"][:] == ["sample_0000", "sample_0003"]
    assert "3 of 5 records were skipped" in caplog.text
    (folder,) = (tmp_path / "prepared").iterdir()
    info = json.loads((folder / INFO_FILE).read_text())
    assert info["records"] == 2
    assert [message.split(":")[0] for message in info["skipped"]] == ["sample_0001", "sample_0002", "sample_0004"]
    with pytest.raises(BadRecord, match="sample_0001.*3 bad records in all"):
        prepare_dataset(flawed, checkpoint, tmp_path / "prepared")


def test_no_usable_record(tmp_path, checkpoint):
    data = pairs(tmp_path / "data", (noise(0), noise(1), None))
    (tmp_path / "data/sample_0000/source.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(BadRecord, match="no usable record is left of 1"):
            prepare_dataset(data, checkpoint, tmp_path / "prepared", on_bad_record="skip")


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

    monkeypatch.setattr(prepare, "PartialState", TwoProcesses)
    results, encoded = {}, {}

    def counting(janus, pixels):
        encoded[here.index] = encoded.get(here.index, 0) + len(pixels)
        return encode_tokens(janus, pixels)

    monkeypatch.setattr(prepare, "encode_tokens", counting)

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
