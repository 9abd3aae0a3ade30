"""Pairs of prompts: the built-in ones, and those of the original's files and of captioned edits."""

import json
import re

import numpy as np
import pytest
from conftest import GOLDEN_ROOT
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from picture_pairs import noise

from thinkclearly.data.pairs import KINDS, PROMPTS, read_images, read_pairs, shape_pairs
from thinkclearly.data.shapes import Scene
from thinkclearly.data.sources import PARTS, BadRecord
from thinkclearly.images import load_image

COUNT = 120


@pytest.fixture(scope="module")
def pairs():
    return {split: shape_pairs(COUNT, split, seed=3, size=48) for split in PARTS}


def scenes_of(row):
    return [Scene.from_json(text) for text in row["scene"]]


def everything(pairs):
    return [row for rows in pairs.values() for row in rows]


def differences(first, second):
    """What differs between two scenes: names of attributes, "more" for a shape that only one has."""
    found = ["background"] * (first.background != second.background)
    if len(first.shapes) != len(second.shapes):
        assert abs(len(first.shapes) - len(second.shapes)) == 1
        fewer, more = sorted((first.shapes, second.shapes), key=len)
        assert set(fewer) < set(more)
        return [*found, "count"]
    for a, b in zip(first.shapes, second.shapes):
        names = {"name": "shape", "colour": "colour", "place": "place"}
        found += [kind for field, kind in names.items() if getattr(a, field) != getattr(b, field)]
        assert a.radius == b.radius and (a.place != b.place or (a.x, a.y) == (b.x, b.y))
    return found


# Built in


def test_the_two_captions_differ_in_what_the_kind_says(pairs):
    for row in everything(pairs):
        kind, found = row["key"].split("[")[0], differences(*scenes_of(row))
        assert len(set(found)) == len(found) == 2 if kind == "two" else found == [kind], row["key"]
        assert row["prompts"][0] != row["prompts"][1]


def test_every_kind_has_its_share(pairs):
    for rows in pairs.values():
        kinds = [key.split("[")[0] for key in rows["key"]]
        assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(KINDS, COUNT // len(KINDS))


def test_captions_say_all_that_is_in_the_picture(pairs):
    for row in everything(pairs):
        for caption, scene in zip(row["prompts"], scenes_of(row)):
            assert caption == scene.caption() and scene.background.name and 1 <= len(scene.shapes) <= 4
            assert caption.endswith(f"{scene.background.name} background")


def test_pictures_are_of_their_scenes_and_square(pairs):
    for row in everything(pairs)[::7]:
        for picture, scene in zip(row["images"], scenes_of(row), strict=True):
            assert np.array_equal(load_image(picture), scene.render(48)) and load_image(picture).size == (48, 48)


def test_a_pair_is_the_same_whatever_is_drawn_beside_it(pairs):
    again = shape_pairs(12, "test", seed=3, size=48)
    assert again.features == PROMPTS and again[:] == pairs["test"][:12]
    assert shape_pairs(12, "test", seed=4, size=48)["prompts"][:] != again["prompts"][:]


def test_parts_share_no_caption_whatever_their_seeds(pairs):
    train = {text for row in shape_pairs(400, "train", seed=9) for text in row["prompts"]}
    parts = [train, *({text for row in pairs[split] for text in row["prompts"]} for split in PARTS[1:])]
    assert len(set.union(*parts)) == sum(map(len, parts))
    short = [text for part in parts for text in part if " and " not in text]
    assert len(short) > 50  # few enough are possible that without a rule some would have met


@pytest.mark.parametrize(("count", "split"), [(0, "train"), (5, "validation")])
def test_what_cannot_be_drawn_is_refused(count, split):
    with pytest.raises(ValueError, match=re.escape(f"split={split!r}, count={count}; expected train, calibration")):
        shape_pairs(count, split)


# Files


def written(folder, records, name="pairs.json", pictures=4):
    """A file of pairs beside pictures 0.png, 1.png, …"""
    folder.mkdir(exist_ok=True)
    for i in range(pictures):
        noise(i).save(folder / f"{i}.png")
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


PAIR = {"prompt1": " a red star ", "prompt2": "a blue star\n", "image1": "0.png", "image2": "1.png"}
EDIT = {"source_caption": "a cat", "target_caption": "a dog", "input_image": ["2.png"], "output_image": "3.png"}


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_pairs_with_pictures_without_and_edits_stand_in_one_file(name, tmp_path):
    bare = {"prompt1": "one", "prompt2": "two"}
    rows = read_pairs(written(tmp_path, [PAIR, bare | {"image1": None, "image2": None}, bare, EDIT], name))
    numbers = [f"[{i}]" for i in range(4)] if name == "pairs.json" else [f":{i}" for i in range(1, 5)]
    assert rows.features == PROMPTS and rows["key"][:] == [name + number for number in numbers]
    words = [["a red star", "a blue star"], ["one", "two"], ["one", "two"], ["a cat", "a dog"]]
    assert rows["prompts"][:] == words and rows["scene"][:] == [[]] * 4
    drawn = [[np.asarray(picture).tobytes() for picture in read_images(row)] for row in rows]
    expected = [np.asarray(noise(i)).tobytes() for i in range(4)]
    assert drawn == [expected[:2], [], [], expected[2:]]


def test_paths_may_be_absolute_and_lead_elsewhere(tmp_path):
    written(tmp_path / "pictures", [])
    paths = {"image1": str(tmp_path / "pictures" / "0.png"), "image2": "../pictures/1.png"}
    (row,) = read_pairs(written(tmp_path / "data", [PAIR | paths], pictures=0))
    assert len(read_images(row)) == 2


def test_every_line_of_a_text_file_is_a_prompt_of_its_own(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffone\n\n  two\u2028lines \r\n \nthree", encoding="utf-8")
    rows = read_pairs(path)
    assert rows["prompts"][:] == [["one"], ["two\u2028lines"], ["three"]] and rows["images"][:] == [[]] * 3
    assert rows["key"][:] == ["prompts.txt:1", "prompts.txt:3", "prompts.txt:5"]


BAD = [
    ("a red star", "found str, expected an object with 'prompt1' and 'prompt2'"),
    (PAIR | {"prompt2": "  "}, "a prompt is missing or empty; expected two, as prompt1/source_caption"),
    ({"prompt1": "one"}, "a prompt is missing or empty"),
    (PAIR | {"prompt1": 3}, "'prompt1' is int, expected text"),
    (PAIR | {"image2": None}, "one picture of two; expected both, or none"),
    (PAIR | {"image2": "9.png"}, "image2 is '9.png', expected the path of a file"),
    (PAIR | {"image1": ["0.png", "1.png"]}, "image1 is .*expected the path of a file"),
    (PAIR | {"image1": 3}, "image1 is 3, expected the path of a file"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_bad_record_is_named_or_skipped(record, message, tmp_path, caplog):
    path = written(tmp_path, [PAIR, record, EDIT])
    with pytest.raises(BadRecord, match=rf"^pairs.json\[1\].*{message}"):
        read_pairs(path)
    assert read_pairs(path, "skip")["key"][:] == ["pairs.json[0]", "pairs.json[2]"]
    assert "skipped 1 bad records, the first: pairs.json[1]" in caplog.text
    with pytest.raises(ValueError, match="none of 1 records can be used"):
        read_pairs(written(tmp_path, [record]), "skip")


def test_a_line_that_is_cut_short_is_named(tmp_path):
    path = written(tmp_path, [PAIR, EDIT], "pairs.jsonl")
    path.write_text(path.read_text()[:-5])
    with pytest.raises(BadRecord, match=r"^pairs.jsonl:2: not JSON .*is the line whole"):
        read_pairs(path)


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "prompts.txt"])
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
    with pytest.raises(BadRecord, match=f"{name}: cannot be read as"):
        read_pairs(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadRecord, match=f"{name}: cannot be read as"):
        read_pairs(tmp_path / name)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    path = written(tmp_path, [PAIR])
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(BadRecord, match=r"^pairs.json\[0\]: image2 .*1.png: not a picture"):
        read_images(read_pairs(path)[0])


def test_other_content_of_a_picture_is_other_data(tmp_path):
    path = written(tmp_path, [PAIR])
    before = read_pairs(path)._fingerprint
    assert read_pairs(path)._fingerprint == before
    noise(7, 80, 80).save(tmp_path / "0.png")
    assert read_pairs(path)._fingerprint != before


# Tables


def table(path, **columns):
    count = len(columns["source_caption"])
    pictures = {"source_image": [noise(i) for i in range(count)], "edited_image": [noise(9 + i) for i in range(count)]}
    features = Features({name: Value("string") for name in columns} | dict.fromkeys(pictures, ImageFeature()))
    Dataset.from_dict({**columns, **pictures}, features=features).to_parquet(path)
    return path


def test_a_table_of_edits_with_captions(tmp_path, own_cache):
    """UltraEdit's columns."""
    path = table(tmp_path / "edits.parquet", source_caption=["a cat", "a car"], target_caption=["a dog", " a bus "])
    rows = read_pairs(path)
    assert rows.features == PROMPTS and rows["key"][:] == ["edits.parquet[0]", "edits.parquet[1]"]
    assert rows["prompts"][:] == [["a cat", "a dog"], ["a car", "a bus"]]
    for i, row in enumerate(rows):
        assert [np.asarray(p).tobytes() for p in read_images(row)] == [
            np.asarray(noise(n)).tobytes() for n in (i, 9 + i)
        ]


def test_a_caption_that_is_missing_is_named_or_skipped(tmp_path, own_cache):
    path = table(tmp_path / "edits.parquet", source_caption=["a cat", None], target_caption=["a dog", "a bus"])
    with pytest.raises(BadRecord, match=r"^edits.parquet\[1\]: a prompt is missing"):
        read_pairs(path)
    assert read_pairs(path, "skip")["key"][:] == ["edits.parquet[0]"]


def test_a_table_without_captions_is_refused(tmp_path, own_cache):
    path = table(tmp_path / "edits.parquet", source_caption=["a cat"], edit=["make it a dog"])
    with pytest.raises(ValueError, match=r"no column for prompt2 \(.*target_caption.*Found: source_caption"):
        read_pairs(path)


# What the original makes of its files

ROOT = GOLDEN_ROOT / "focusdiff_tiny"


@pytest.fixture(scope="module")
def original():
    if not ROOT.is_dir():
        pytest.skip(f"{GOLDEN_ROOT} has no such set")
    return json.loads((ROOT / "values.json").read_text(encoding="utf-8"))["dataset"]


@pytest.mark.golden
def test_every_item_of_the_original_is_there_and_those_that_it_loses(original, tmp_path):
    placed = json.loads(json.dumps(original).replace('"/img/', f'"{tmp_path}/'))  # files that are there
    for record in placed["pairs"]:
        for name in ("image1", "image2"):
            noise(0).save(record[name])
    (tmp_path / "prompts.txt").write_text("\n".join(placed["lines"]))
    pairs, lines = read_pairs(written(tmp_path, placed["pairs"], pictures=0)), read_pairs(tmp_path / "prompts.txt")
    found = [(row["prompts"], [image["path"] for image in row["images"]]) for row in pairs]
    kept = [(item["text"], item["imag"]) for item in placed["items"] if item["pair"]]
    assert found[: len(kept)] == kept and len(found) == len(placed["pairs"]) > len(kept)
    texts = [text for (text,) in lines["prompts"]]
    assert texts == [item["text"] for item in placed["vanilla_items"]]
    joined = [text for item in placed["items"] if not item["pair"] for text in item["text"]]
    assert texts[: len(joined)] == joined and len(texts) > len(joined)
