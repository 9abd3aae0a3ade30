"""What is held out shares no picture and no session with training, whatever the source; two parts for two purposes."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from random_photos import photo

from thinkclearly.data import sources
from thinkclearly.data.encode import INFO_FILE
from thinkclearly.data.jsonl import write_jsonl
from thinkclearly.data.options import DataArguments
from thinkclearly.data.pairs import PROMPTS
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.data.sources import EditExample, write_folder
from thinkclearly.data.splits import PARTS, build_data, build_prompts, held_out_counts, read_rows
from thinkclearly.images import load_image
from thinkclearly.models.janus.model import Janus
from thinkclearly.models.load import load_checkpoint

SESSIONS, TURNS = 8, 3
HELD_OUT = {"eval_samples": 3, "calibration_edits": 3}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def checkpoint(golden):
    return load_checkpoint(golden / "checkpoint")


@pytest.fixture(scope="module")
def turns():
    """Sessions of three turns, each of which starts from what the one before made: (session, source, target)."""
    pictures = {(s, t): photo(100 * s + t) for s in range(SESSIONS) for t in range(TURNS + 1)}
    return [(s, pictures[s, t], pictures[s, t + 1]) for s in range(SESSIONS) for t in range(TURNS)]


def write_table(turns, path):
    features = {"img_id": Value("int64"), "turn_index": Value("int64"), "instruction": Value("string")}
    features |= {"source_img": ImageFeature(), "target_img": ImageFeature()}
    rows = [
        {"img_id": s, "turn_index": 1 + i % TURNS, "instruction": f"edit {i}", "source_img": a, "target_img": b}
        for i, (s, a, b) in enumerate(turns)
    ]
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)


@pytest.fixture(scope="module")
def everything(turns, checkpoint, tmp_path_factory):
    """Options of every source, the same sessions in each that reads files."""
    root = tmp_path_factory.mktemp("sources")
    write_table(turns, root / "table.parquet")
    write_folder((EditExample(a, b, f"edit {i}") for i, (_, a, b) in enumerate(turns)), root / "folder")
    records = []
    for i, (_, source, target) in enumerate(turns):
        source.save(root / f"{i}.bmp")
        target.save(root / f"{i}-after.png")  # another file of the same picture
        records.append({"input_prompt": f"edit {i}", "input_image": [f"{i}.bmp"], "output_image": f"{i}-after.png"})
    (root / "share.json").write_text(json.dumps(records))
    prepared = prepare_dataset(sources.folder(root / "folder"), checkpoint, root / "prepared")
    (folder,) = (root / "prepared").iterdir()
    write_jsonl(prepared, root / "records.jsonl", 128)
    plain = prepared.remove_columns("origins").map(lambda row: {"output_tokens": row["target_tokens"]})
    write_jsonl(plain, root / "plain.jsonl", 128)  # as the original writes it
    table = {"source": "magicbrush", "path": str(root / "table.parquet")}
    options = {
        "magicbrush": table,
        "magicbrush, streamed": table | {"streaming": True},
        "folder": {"source": "folder", "path": str(root / "folder")},
        "sharegpt4o": {"source": "sharegpt4o", "path": str(root / "share.json")},
        "jsonl": {"source": "jsonl", "path": str(root / "records.jsonl")},
        "jsonl without origins": {"source": "jsonl", "path": str(root / "plain.jsonl")},
        "prepared": {"source": "prepared", "path": str(folder)},
        "shapes": {"limit": 6, "shapes_size": 48},
    }
    return {source: given | {"prepared_dir": str(root / "prepared")} for source, given in options.items()}


def sessions_of(records):
    return {int(text.split()[-1]) // TURNS for text in records["instruction"]}


def pictures_of(rows):
    """What a reader sees of both sides of all rows, compared pixel by pixel."""
    sides = [load_image(row[side]) for row in rows for side in ("source", "target")]
    return {hashlib.sha256(picture.tobytes()).hexdigest() for picture in sides}


def parts_of(data):
    return [part for name in PARTS if (part := getattr(data, name)) is not None]


def disjoint(sets):
    return len(set.union(*sets)) == sum(map(len, sets))


FILES = [
    *("magicbrush", "magicbrush, streamed", "folder", "sharegpt4o"),
    *("prepared", "jsonl", "jsonl without origins"),
]


@pytest.mark.parametrize("source", FILES)
def test_no_session_is_on_both_sides_of_a_boundary(source, everything, checkpoint):
    found = build_data(DataArguments(**HELD_OUT, **everything[source]), checkpoint)
    parts = parts_of(found)
    assert len(found.test) == 3 and sum(map(len, parts)) == SESSIONS * TURNS
    assert disjoint([sessions_of(records) for records in parts])
    if "jsonl" in source:
        assert found.calibration is None  # which edits pictures
    else:
        assert len(found.calibration) == 3


@pytest.mark.parametrize("source", ["magicbrush", "folder", "sharegpt4o", "shapes"])
def test_no_picture_is_on_both_sides_of_a_boundary(source, everything, checkpoint):
    found = build_data(DataArguments(**HELD_OUT, **everything[source]), checkpoint)
    rows = [found.rows[name] for name in PARTS]
    assert disjoint([pictures_of(part) for part in rows])
    assert [part["key"][:] for part in rows] == [part["key"][:] for part in parts_of(found)]


def test_turns_whose_pictures_differ_stay_in_their_session(turns, checkpoint, tmp_path):
    """The turn between them is filtered out, so that only the session's name ties the others."""
    write_table(turns, tmp_path / "table.parquet")
    middle = [f"edit {i}" for i in range(1, len(turns), TURNS)]
    options = {"source": "magicbrush", "path": str(tmp_path / "table.parquet"), "prepared_dir": str(tmp_path)}
    data = DataArguments(**HELD_OUT, **options, exclude=middle)
    parts = parts_of(build_data(data, checkpoint))
    assert 0 < sum(map(len, parts)) < SESSIONS * TURNS and disjoint([sessions_of(records) for records in parts])


def test_other_counts_encode_nothing_anew_and_keep_the_reported_records(everything, checkpoint, monkeypatch):
    options = everything["folder"]
    first = build_data(DataArguments(**HELD_OUT, **options), checkpoint)
    monkeypatch.setattr(Janus, "encode", None)
    again = build_data(DataArguments(**(HELD_OUT | {"calibration_edits": 6}), **options), checkpoint)
    assert again.test["key"][:] == first.test["key"][:] and len(again.calibration) == 6


def test_skipped_records_are_in_no_part(turns, checkpoint, tmp_path):
    write_folder((EditExample(a, b, f"edit {i}") for i, (_, a, b) in enumerate(turns)), tmp_path / "folder")
    broken = [f"sample_{i:04d}" for i in range(0, len(turns), 2)]
    for name in broken:
        (tmp_path / "folder" / name / "target.png").write_bytes(b"broken")
    options = {"source": "folder", "path": str(tmp_path / "folder"), "on_bad_record": "skip"}
    found = build_data(DataArguments(**HELD_OUT, **options, prepared_dir=str(tmp_path / "prepared")), checkpoint)
    for rows in found.rows.values():
        assert rows["key"][:] and not set(rows["key"]) & set(broken)
        assert [sources.read_example(row).key for row in rows] == rows["key"][:]
    assert sum(map(len, parts_of(found))) == len(turns) - len(broken)


def test_of_the_built_in_shapes_only_what_is_wanted_is_made(everything, checkpoint, tmp_path):
    data = DataArguments(**HELD_OUT, **everything["shapes"] | {"prepared_dir": str(tmp_path)})
    alone = build_data(data, checkpoint, ["calibration"])
    assert alone.train is None and alone.test is None and len(list(tmp_path.iterdir())) == 1
    both = build_data(data, checkpoint)
    assert both.calibration["key"][:] == alone.calibration["key"][:] == alone.rows["calibration"]["key"][:]
    assert (len(both.train), len(both.calibration), len(both.test)) == (6, 3, 3)


def test_nothing_held_out_is_none(everything, checkpoint):
    data = DataArguments(eval_samples=0, calibration_edits=0, **everything["folder"])
    found = build_data(data, checkpoint)
    assert len(found.train) == SESSIONS * TURNS
    assert found.test is found.calibration is None and list(found.rows) == ["train"]


# Little data


@pytest.mark.parametrize(
    ("records", "wanted", "counts"),
    [
        (1000, (50, 64), (50, 64)),
        (228, (50, 64), (50, 64)),
        (200, (50, 64), (50, 50)),
        (40, (50, 4), (10, 4)),
        (4, (50, 64), (1, 1)),
        (3, (50, 64), (1, 1)),
        (2, (50, 0), (1, 0)),
    ],
)
def test_of_little_data_at_least_half_is_left_to_train_on(records, wanted, counts, caplog):
    with caplog.at_level(logging.WARNING):
        found = held_out_counts(records, {"test": wanted[0], "calibration": wanted[1]})
    assert (found["test"], found["calibration"]) == counts
    assert (f"{records} records: {counts[0]} for evaluation" in caplog.text) == (counts != wanted)


@pytest.mark.parametrize(("records", "wanted"), [(2, (50, 64)), (1, (1, 0)), (1, (0, 64))])
def test_too_few_records_are_refused(records, wanted):
    with pytest.raises(ValueError, match=f"{records} records are too few to hold some out .*calibration_edits"):
        held_out_counts(records, {"test": wanted[0], "calibration": wanted[1]})


def test_records_that_all_share_a_picture_cannot_be_split(checkpoint, tmp_path):
    write_folder((EditExample(photo(0), photo(i), f"edit {i}") for i in range(1, 9)), tmp_path / "folder")
    options = {"source": "folder", "path": str(tmp_path / "folder"), "prepared_dir": str(tmp_path / "prepared")}
    with pytest.raises(ValueError, match="held out for test: 8 records form 1 groups .*Add other pictures"):
        build_data(DataArguments(eval_samples=2, **options), checkpoint)


# Prepared before


def test_data_that_an_earlier_version_prepared_are_split_by_their_codes(everything, checkpoint, tmp_path):
    """Without `origins`, as a folder of two parts had been."""
    before, folder = Path(everything["prepared"]["path"]), tmp_path / "old"
    (shard,) = before.glob("shard-*")
    Dataset.load_from_disk(str(shard)).remove_columns("origins").save_to_disk(str(folder / shard.name))
    shutil.copy(before / INFO_FILE, folder)
    found = build_data(DataArguments(**HELD_OUT, source="prepared", path=str(folder)), checkpoint)
    assert len(found.test) == len(found.calibration) == 3
    assert disjoint([sessions_of(records) for records in parts_of(found)])


def test_a_folder_of_several_preparations_is_not_mixed(everything, checkpoint, tmp_path):
    path = everything["prepared"]["path"]
    shutil.copytree(path, tmp_path / "one")
    shutil.copytree(path, tmp_path / "two")
    with pytest.raises(FileNotFoundError, match=f"no {INFO_FILE}; give .*one or .*two"):
        build_data(DataArguments(source="prepared", path=str(tmp_path)), checkpoint)
    (shard,) = (tmp_path / "one").glob("shard-*")
    shutil.copytree(shard, tmp_path / "one" / "shard-00001-of-00002")
    with pytest.raises(ValueError, match=f"holds 48 records, {INFO_FILE} says 24"):
        build_data(DataArguments(source="prepared", path=str(tmp_path / "one")), checkpoint)


# Which records


@pytest.mark.parametrize("source", ["folder", "sharegpt4o", "jsonl", "prepared"])
def test_words_limit_and_shuffling_choose_the_records(source, everything, checkpoint):
    options = everything[source] | {"eval_samples": 0, "calibration_edits": 0}

    def chosen(**choice):
        data = DataArguments(**options, **choice)
        pictures = source in ("folder", "sharegpt4o")
        return (read_rows(data) if pictures else build_data(data, checkpoint).train)["instruction"][:]

    assert chosen(include=["EDIT 1"], exclude=["12"]) == ["edit 1", *(f"edit {i}" for i in range(10, 20) if i != 12)]
    assert chosen(include=["edit", "3"], match="all", limit=2) == ["edit 3", "edit 13"]
    shuffled = chosen(shuffle=True, limit=5)
    assert len(shuffled) == 5 and shuffled == chosen(shuffle=True, limit=5) != [f"edit {i}" for i in range(5)]
    with pytest.raises(ValueError, match="none of 24 records is left; relax include and exclude"):
        chosen(include=["zebra"])


# Prompts to draw


@pytest.fixture
def drawn(tmp_path):
    """Pairs over eight pictures, each with its neighbour or with the one after, and lines that repeat some prompts."""
    for i in range(8):
        photo(i).save(tmp_path / f"{i}.png")
    pairs = [
        {"prompt1": f"pair {i} a", "prompt2": f"pair {i} b", "image1": f"{2 * (i % 4)}.png", "image2": f"{end}.png"}
        for i, end in enumerate([1, 3, 5, 7] * 3)
    ]
    bare = [{"prompt1": f"bare {i}", "prompt2": f"pair {i} a"} for i in range(4)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs + bare))
    (tmp_path / "lines.txt").write_text("\n".join([f"line {i}" for i in range(6)] + ["pair 5 b", "line 0"]))
    return {"source": "pairs", "path": str(tmp_path / "pairs.json")}


def words_of(part):
    return {text for row in part for text in row["prompts"]}


def test_no_prompt_and_no_picture_is_on_both_sides_of_a_boundary(drawn, tmp_path):
    for seed in range(5):
        data = DataArguments(**drawn, eval_samples=8, split_seed=seed)
        found = build_prompts(data, str(tmp_path / "lines.txt"))
        assert len(found.train) + len(found.test) == 24 and 0 < len(found.test) <= 8
        assert found.calibration is None and found.train.features == found.test.features == PROMPTS
        assert disjoint([words_of(part) for part in (found.train, found.test)])
        pictures = [{p["path"] for row in part for p in row["images"]} for part in (found.train, found.test)]
        assert disjoint(pictures) and len(set.union(*pictures)) == 8


def test_pictures_in_a_table_are_told_apart_by_their_bytes(tmp_path):
    captions = {side: [f"{side} {i}" for i in range(12)] for side in ("source_caption", "target_caption")}
    pictures = {side: [photo(i % 4 + n) for i in range(12)] for n, side in ((0, "source_image"), (50, "edited_image"))}
    features = {name: Value("string") for name in captions} | dict.fromkeys(pictures, ImageFeature())
    Dataset.from_dict({**captions, **pictures}, Features(features)).to_parquet(tmp_path / "table.parquet")
    found = build_prompts(DataArguments(source="pairs", path=str(tmp_path / "table.parquet"), eval_samples=3))
    assert (len(found.train), len(found.test)) == (9, 3)
    assert disjoint([{p["bytes"] for row in part for p in row["images"]} for part in (found.train, found.test)])


def test_words_limit_and_shuffling_choose_the_prompts(drawn, tmp_path):
    def chosen(**choice):
        data = DataArguments(**drawn, eval_samples=0, **choice)
        return [" | ".join(prompts) for prompts in build_prompts(data, str(tmp_path / "lines.txt")).train["prompts"]]

    assert chosen(include=["PAIR 5"], exclude=["5 a"]) == ["pair 5 b"]  # any prompt of a pair counts
    assert chosen(include=["bare"], limit=2) == ["bare 0 | pair 0 a", "bare 1 | pair 1 a"]
    shuffled = chosen(shuffle=True, limit=5)
    assert len(shuffled) == 5 and shuffled == chosen(shuffle=True, limit=5) != chosen(limit=5)
    with pytest.raises(ValueError, match="none of 24 records is left; relax include and exclude"):
        chosen(include=["zebra"])


def test_built_in_pairs_have_parts_of_their_own():
    found = build_prompts(DataArguments(limit=12, eval_samples=6, shapes_size=32))
    assert (len(found.train), len(found.test)) == (12, 6) and disjoint([words_of(found.train), words_of(found.test)])
    again = build_prompts(DataArguments(limit=6, eval_samples=0, shapes_size=32))
    assert again.test is None and again.train[:] == found.train[:6]


def test_what_means_nothing_for_prompts_is_refused(drawn, tmp_path):
    with pytest.raises(ValueError, match="source: magicbrush has no prompts to draw and reward; expected pairs or"):
        build_prompts(DataArguments(source="magicbrush"))
    with pytest.raises(ValueError, match="photos_folder and prompts_path mean nothing here"):
        build_prompts(DataArguments(photos_folder=str(tmp_path)))
    with pytest.raises(ValueError, match="photos_folder and prompts_path mean nothing here"):
        build_prompts(DataArguments(), str(tmp_path / "lines.txt"))
