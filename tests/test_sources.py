"""Folders, ShareGPT-4o-Image and shapes become rows that can be read back; what is wrong with a record is named."""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_photos import photo, png

from thinkclearly.data import sources
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.data.sources import (
    BadRecord,
    EditExample,
    folder,
    read_example,
    sharegpt4o,
    write_folder,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def test_bad_pictures_are_named():
    row = {"key": "dev[3]", "instruction": "go", "source": {"bytes": png(photo(1)), "path": "a.png"}, "mask": None}
    for target, message in [
        ({"bytes": png(photo(2))[:300], "path": "b.png"}, "target b.png: cannot be read"),
        ({"bytes": None, "path": "/nowhere/b.png"}, "target /nowhere/b.png: no such file"),
        (None, "target: there is no picture"),
    ]:
        with pytest.raises(BadRecord, match=rf"dev\[3\]: {message}"):
            read_example({**row, "target": target})
    with pytest.raises(BadRecord, match="the instruction is empty"):
        read_example({**row, "target": row["source"], "instruction": None})


def test_masks_of_other_sizes_and_kinds(caplog):
    picture = {"bytes": png(photo(1)), "path": None}
    row = {"key": "k", "instruction": "go", "source": picture, "target": picture}
    small = np.zeros((15, 20), np.uint8)
    small[:5] = 255
    mask = read_example({**row, "mask": {"bytes": png(Image.fromarray(small)), "path": None}}).mask
    assert mask.size == (40, 30) and (np.asarray(mask)[:10] == 255).all() and (np.asarray(mask)[10:] == 0).all()
    sources._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert read_example({**row, "mask": {"bytes": png(photo(3)), "path": None}}).mask is None
    assert caplog.text.count("colour pictures without transparency") == 1


# Folders


def test_folder_round_trip(tmp_path):
    mask = Image.fromarray(np.uint8(np.eye(30, 40) > 0) * 255)
    examples = [EditExample(photo(1), photo(2), "grüß — 红", mask), EditExample(photo(3, 50, 50), photo(4), "b", None)]
    assert write_folder(iter(examples), tmp_path / "out") == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sample_0000", "sample_0001"]
    dataset = folder(tmp_path / "out")
    assert dataset.features == sources.FEATURES
    for example, row in zip(examples, dataset):
        again = read_example(row)
        assert again.instruction == example.instruction
        assert np.array_equal(again.source, example.source) and np.array_equal(again.target, example.target)
    assert read_example(dataset[1]).mask is None and np.array_equal(read_example(dataset[0]).mask, mask)
    with pytest.raises(FileExistsError, match="sample_0000 is of another export"):
        write_folder(reversed(examples), tmp_path / "out")


def test_interrupted_export_leaves_whole_samples_and_goes_on(tmp_path):
    good = EditExample(photo(1), photo(2), "a")
    with pytest.raises(AttributeError):
        write_folder([good, EditExample(photo(1), None, "b", mask="not a picture")], tmp_path)
    assert len(folder(tmp_path)) == 1
    first = (tmp_path / "sample_0000").stat().st_mtime_ns
    assert write_folder([good, good], tmp_path) == len(folder(tmp_path)) == 2
    assert (tmp_path / "sample_0000").stat().st_mtime_ns == first


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"instruction": "a"', "cannot be read as JSON"),
        ("[]", "top level is list, expected an object"),
        ('{"instruction": 3}', "'instruction' is int"),
        ('{"instruction": "a", "source": "../../etc/passwd"}', "leads outside"),
        ('{"instruction": "a", "source": "/etc/passwd"}', "leads outside"),
        ('{"instruction": "a", "source": "..\\\\\\\\x.png"}', "leads outside"),
        ('{"instruction": "a", "mask": 3}', "is 3, expected a relative path"),
        (None, "metadata.json: cannot be read"),
    ],
)
def test_bad_metadata(tmp_path, metadata, message):
    write_folder([EditExample(photo(1), photo(2), "a")], tmp_path)
    path = tmp_path / "sample_0000" / "metadata.json"
    path.unlink() if metadata is None else path.write_text(metadata)
    with pytest.raises(BadRecord, match=f"sample_0000.*{message}"):
        folder(tmp_path)


def test_folder_with_a_missing_picture_fails_at_its_record(tmp_path):
    write_folder([EditExample(photo(i), photo(2), "a") for i in range(2)], tmp_path)
    os.remove(tmp_path / "sample_0001" / "target.png")
    dataset = folder(tmp_path)
    read_example(dataset[0])
    with pytest.raises(BadRecord, match="sample_0001: target .*no such file"):
        read_example(dataset[1])
    with pytest.raises(FileNotFoundError, match="sample_0000/source.png"):
        folder(tmp_path / "sample_0000")


def test_a_changed_picture_changes_the_fingerprint(tmp_path):
    write_folder([EditExample(photo(1), photo(2), "a")], tmp_path)
    first, again = folder(tmp_path), folder(tmp_path)
    photo(3).save(tmp_path / "sample_0000" / "target.png")
    assert first._fingerprint == again._fingerprint != folder(tmp_path)._fingerprint


# ShareGPT-4o-Image


def test_sharegpt4o(tmp_path, caplog):
    for i in range(3):
        photo(i).save(tmp_path / f"{i}.png")
    records = [
        {"input_prompt": "a cat", "output_image": "0.png"},
        {"input_prompt": "a cat", "output_image": "0.png", "input_image": None},
        {"input_prompt": "both", "output_image": "0.png", "input_image": ["1.png", "2.png"]},
        {"input_prompt": "bluer", "output_image": "1.png", "input_image": ["0.png"]},
        {"input_prompt": None, "output_image": "1.png", "input_image": ["0.png"]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    with caplog.at_level(logging.INFO):
        dataset = sharegpt4o(path)
    assert "2 edits; skipped 2 text-to-image records and 1 with several" in caplog.text
    assert dataset["key"][:] == ["data.json[3]", "data.json[4]"] and len(sharegpt4o(path, limit=1)) == 1
    assert np.array_equal(read_example(dataset[0]).target, photo(1))
    with pytest.raises(BadRecord, match=r"data.json\[4\]: the instruction is empty"):
        read_example(dataset[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "top level is dict, expected an array"),
        ([3], r"\[0\]: found int"),
        ([{"input_prompt": "a", "output_image": "a", "input_image": "b"}], r"\[0\]: 'input_image' is str"),
        ([{"input_prompt": "a", "output_image": "a", "input_image": ["../b"]}], r"\[0\]: input_image.*leads outside"),
        ([{"input_prompt": "a", "input_image": ["b"]}], r"\[0\]: output_image is None"),
        ([{"input_prompt": "a", "output_image": "b"}], "no edit with one input image .skipped 1 text-to-image"),
    ],
)
def test_bad_sharegpt4o(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"data.json.*{message}"):
        sharegpt4o(path)


# Shapes


def test_shapes():
    dataset = sources.shapes(3, 48, seed=7, operations=("recolour", "add"))
    assert dataset.features == sources.FEATURES and dataset["key"][:] == [f"shapes[7:{i}]" for i in range(3)]
    edit = random_edit(7, 1, packaged_photos("train"), ("recolour", "add"))
    example = read_example(dataset[1])
    assert example.instruction == edit.instruction
    for found, expected in zip((example.source, example.target, example.mask), edit.render(48)):
        assert np.array_equal(found, expected)
    test = sources.shapes(3, 48, seed=7, split="test")
    assert test["key"][0] == f"shapes[7:{sources.OFFSETS['test']}]"
    assert test[0]["source"] != sources.shapes(3, 48, seed=7)[0]["source"]


def test_shapes_over_own_photos(tmp_path):
    for side in (64, 65, 66):
        Image.new("RGB", (side, side), (1, 254, 1)).save(tmp_path / f"{side}.jpg", quality=100)
    (tmp_path / "notes.txt").write_text("no picture")
    dataset = sources.shapes(8, 48, photos_folder=tmp_path)
    corners = [read_example(row).source.getpixel((0, 0)) for row in dataset]
    assert any(max(abs(a - b) for a, b in zip(corner, (1, 254, 1))) < 8 for corner in corners)
    for side in (64, 65, 66):  # new content: nothing stale
        Image.new("RGB", (side, side), (254, 1, 254)).save(tmp_path / f"{side}.jpg", quality=100)
    sources.shape_generator.open_photo.cache_clear()
    again = sources.shapes(8, 48, photos_folder=tmp_path)
    assert any(a["source"] != b["source"] for a, b in zip(dataset, again))


def test_no_photograph_of_a_folder_is_drawn_on_in_two_parts(tmp_path):
    for i in range(10):
        photo(i, 64, 64).save(tmp_path / f"{i}.png")
        shutil.copy(tmp_path / f"{i}.png", tmp_path / f"copy of {i}.png")
    parts = [sources.photos_of(split, tmp_path) for split in sources.PARTS]
    assert [len(part) for part in parts] == [12, 4, 4]
    contents = [{Path(path).read_bytes() for path in part} for part in parts]
    assert len(set.union(*contents)) == sum(map(len, contents)) == 10


def test_too_few_photographs_for_three_parts(tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 2), ("copy of b.png", 2)):
        photo(seed, 64, 64).save(tmp_path / name)
    with pytest.raises(ValueError, match="2 different pictures; expected 3 or more"):
        sources.shapes(2, 48, photos_folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "'dev': the built-in shapes have train, calibration, test"),
        ({"operations": ("explode",)}, "expected some of"),
        ({"operations": ()}, "expected some of"),
        ({"count": 0}, "at least 1"),
    ],
)
def test_bad_shapes(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sources.shapes(**{"count": 2, "size": 48, **options})
    with pytest.raises(ValueError, match="no picture"):
        sources.shapes(2, 48, photos_folder=tmp_path)
