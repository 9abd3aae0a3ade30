import json
import multiprocessing
import os
import time

import psutil
import pytest
import torch
from datasets import Features, List, Value
from picture_pairs import noise, pairs

from thinkclearly.data import sources
from thinkclearly.data.encode import INFO_FILE, Layout, Record, encode_dataset, load_encoded
from thinkclearly.data.sources import BadRecord, read_example
from thinkclearly.images import Letterbox
from thinkclearly.models.janus.model import Janus
from thinkclearly.models.load import load_checkpoint

K, N = 128, 36
FEATURES = Features({"key": Value("string"), "source": List(Value("int32")), "target": List(Value("int32"))})


def read_both(row, size, grid):
    """Both pictures of a pair, each in a square of its own."""
    example = read_example(row)
    squares = [Letterbox(*picture.size, size).fit(picture) for picture in (example.source, example.target)]
    return Record({"key": row["key"]}, squares, {"source": [0], "target": [1]})


BOTH = Layout(FEATURES, read_both)


def encode(rows, checkpoint, directory, layout=BOTH, **options):
    return encode_dataset(rows, checkpoint, directory, layout, **options)


@pytest.fixture(scope="module")
def checkpoint(golden):
    return load_checkpoint(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        return sources.shapes(6, 48, seed=3)


@pytest.fixture(scope="module")
def encoded(rows, checkpoint, tmp_path_factory):
    return encode(rows, checkpoint, tmp_path_factory.mktemp("encoded"), batch_size=4)


def shards(directory):
    (folder,) = directory.iterdir()
    return sorted(path for path in folder.iterdir() if path.is_dir())


def same(a, b):
    return a.column_names == b.column_names and a[:] == b[:]


# What is stored


def test_a_column_holds_the_codes_of_any_number_of_pictures_one_after_the_other(rows, encoded, checkpoint, tmp_path):
    def read(row, size, grid):
        record = read_both(row, size, grid)
        return Record({"key": row["key"]}, record.squares, {"both": [1, 0], "none": []})

    features = Features({"key": Value("string"), "both": List(Value("int32")), "none": List(Value("int32"))})
    found = encode(rows, checkpoint, tmp_path, Layout(features, read))
    assert found["both"][:] == [row["target"] + row["source"] for row in encoded]
    assert found["none"][:] == [[]] * len(rows)


# Found again


def test_shards_are_encoded_once(rows, encoded, checkpoint, tmp_path, small_shards, encoded_pictures):
    first = encode(rows, checkpoint, tmp_path, batch_size=4)
    assert encoded_pictures == [4, 4, 4] and len(shards(tmp_path)) == 3
    again = encode(rows, checkpoint, tmp_path, batch_size=4)
    assert encoded_pictures == [4, 4, 4]
    assert same(first, again) and same(first, encoded)


def test_an_interrupted_run_goes_on(rows, encoded, checkpoint, tmp_path, small_shards, encoded_pictures):
    encode(rows, checkpoint, tmp_path)
    done, lost = shards(tmp_path)[0], shards(tmp_path)[1]
    stamp = (done / "state.json").stat().st_mtime_ns
    # As a killed run leaves it: half a folder under a temporary name.
    left = lost.rename(lost.with_name(f".{lost.name}.0123.tmp"))
    (left / "data-00000-of-00001.arrow").write_bytes(b"half")
    os.utime(left, (0, 0))
    encoded_pictures.clear()
    assert same(encode(rows, checkpoint, tmp_path), encoded)
    assert encoded_pictures == [4]
    assert not list(tmp_path.rglob("*.tmp"))
    assert (done / "state.json").stat().st_mtime_ns == stamp


def test_a_failed_run_leaves_whole_shards_only(tmp_path, checkpoint, small_shards, encoded_pictures):
    data = pairs(tmp_path / "data", *[(noise(i), noise(i + 9), None) for i in range(4)])
    (tmp_path / "data/sample_0003/target.png").write_bytes(b"broken")
    with pytest.raises(BadRecord, match="sample_0003"):
        encode(data, checkpoint, tmp_path / "prepared")
    assert [path.name for path in shards(tmp_path / "prepared")] == ["shard-00000-of-00002"]
    encoded_pictures.clear()
    assert len(encode(data, checkpoint, tmp_path / "prepared", on_bad_record="skip")) == 3
    assert encoded_pictures == [2]


def test_another_codebook_is_refused(rows, golden, tmp_path):
    checkpoint = load_checkpoint(str(golden / "checkpoint"))
    encode(rows, checkpoint, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(load_encoded(folder, checkpoint)) == len(rows)
    with torch.no_grad():
        checkpoint.network.model.vqmodel.quantize.embedding.weight[0] += 1.0
    with pytest.raises(ValueError, match="was prepared with codebook_hash=.*Prepare the data again"):
        load_encoded(folder, checkpoint)
    encode(rows, checkpoint, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_another_layout_stored_is_not_found(rows, checkpoint, tmp_path, encoded_pictures):
    for layout in (BOTH, Layout(FEATURES, read_both, transforms={"BLUR": "its digest"})):
        encode(rows, checkpoint, tmp_path, layout)
    assert len(list(tmp_path.iterdir())) == 2 and len(encoded_pictures) == 2


def test_preparation_file(rows, encoded, checkpoint, tmp_path):
    encode(rows, checkpoint, tmp_path)
    (folder,) = tmp_path.iterdir()
    info = json.loads((folder / INFO_FILE).read_text())
    assert len(info.pop("codebook_hash")) == 16
    assert info == {
        "codebook_size": K, "image_size": 96, "num_image_tokens": N, "dtype": "float32", "records": 6, "skipped": [],
        "transforms": {},
    }  # fmt: skip


def test_of_two_runs_that_prepare_the_same_data_one_finds_what_the_other_wrote(
    rows, encoded, checkpoint, tmp_path, small_shards, monkeypatch
):
    calls, results, real = [], [], Janus.encode

    def interrupted(janus, pixels):
        """In the middle of the first shard another run comes and goes."""
        calls.append(len(pixels))
        if len(calls) == 1:
            results.append(encode(rows, checkpoint, tmp_path))
        return real(janus, pixels)

    monkeypatch.setattr(Janus, "encode", interrupted)
    results.append(encode(rows, checkpoint, tmp_path))
    assert all(same(result, encoded) for result in results)
    assert len(calls) == 1 + 3  # the shard that had begun, and all three of the other run
    assert not list(tmp_path.rglob("*.tmp"))


# Batches and workers


def test_batches_and_workers_change_nothing(rows, encoded, checkpoint, tmp_path, small_shards):
    examples = [read_example(row) for row in rows]
    alone = [
        checkpoint.token_model.encode(checkpoint.processor.pixel_values([Letterbox(*e.source.size, 96).fit(e.source)]))
        for e in examples
    ]
    assert torch.equal(torch.cat(alone), torch.tensor(encoded["source"][:]))
    before = torch.get_rng_state()
    for workers, batch_size in ((0, 1), (2, 1), (2, 2)):
        directory = tmp_path / f"{workers}, {batch_size}"
        assert same(encode(rows, checkpoint, directory, batch_size=batch_size, workers=workers), encoded)
    assert torch.equal(torch.get_rng_state(), before)  # what is trained next must not depend on it
    with pytest.raises(ValueError, match="num_workers"):
        encode(rows, checkpoint, tmp_path / "-1", workers=-1)


def test_a_picture_is_encoded_once_in_a_shard(tmp_path, checkpoint, encoded_pictures):
    turns = [(noise(0), noise(1), None), (noise(1), noise(2), None), (noise(2), noise(2), None)]
    session = encode(pairs(tmp_path / "data", *turns), checkpoint, tmp_path / "once", batch_size=2)
    assert encoded_pictures == [3]
    single = [encode(pairs(tmp_path / f"{i}", turn), checkpoint, tmp_path / "each") for i, turn in enumerate(turns)]
    for name in ("source", "target"):
        assert session[name][:] == [one[name][0] for one in single]


def test_workers_end_with_a_killed_run(rows, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(Janus, "encode", lambda janus, pixels: time.sleep(60))
    options = {"batch_size": 1, "workers": 2}
    run = multiprocessing.get_context("fork").Process(target=encode, args=(rows, checkpoint, tmp_path), kwargs=options)
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


def test_an_unknown_choice(rows, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="on_bad_record='ignore'; choose 'error' or 'skip'"):
        encode(rows, checkpoint, tmp_path, on_bad_record="ignore")


@pytest.fixture
def flawed(tmp_path):
    data = tmp_path / "data"
    pairs(data, *[(noise(i), noise(i + 9), None) for i in range(5)])
    (data / "sample_0001/source.png").write_bytes(b"not a picture")
    (data / "sample_0002/metadata.json").write_text(json.dumps({"instruction": " "}))
    (data / "sample_0004/target.png").unlink()
    return sources.folder(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_stops(workers, flawed, checkpoint, tmp_path):
    with pytest.raises(BadRecord, match="^sample_0001: source .*source.png"):
        encode(flawed, checkpoint, tmp_path / "prepared", batch_size=1, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_skipped_and_listed(workers, flawed, checkpoint, tmp_path, caplog, small_shards):
    dataset = encode(flawed, checkpoint, tmp_path / "prepared", on_bad_record="skip", workers=workers)
    assert dataset["key"][:] == ["sample_0000", "sample_0003"]
    assert "3 of 5 records were skipped" in caplog.text
    (folder,) = (tmp_path / "prepared").iterdir()
    info = json.loads((folder / INFO_FILE).read_text())
    assert info["records"] == 2
    assert [message.split(":")[0] for message in info["skipped"]] == ["sample_0001", "sample_0002", "sample_0004"]
    with pytest.raises(BadRecord, match="sample_0001.*3 bad records in all"):
        encode(flawed, checkpoint, tmp_path / "prepared")


def test_no_usable_record(tmp_path, checkpoint):
    data = pairs(tmp_path / "data", (noise(0), noise(1), None))
    (tmp_path / "data/sample_0000/source.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(BadRecord, match="no usable record is left of 1"):
            encode(data, checkpoint, tmp_path / "prepared", on_bad_record="skip")
