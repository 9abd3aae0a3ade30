"""MagicBrush's sessions and PIE-Bench as their authors pack them, and what is wrong with a damaged copy."""

import json

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from thinkclearly.data.benchmarks import decode_mask, magicbrush_turns, pie_bench
from thinkclearly.data.sources import BadRecord, read_example


def picture(level, size=32):
    return Image.new("RGB", (size, size), (level, 0, 0))


@pytest.fixture
def archive(tmp_path):
    """Session 7 with two turns, session 3 with one; masks transparent where edited."""
    sessions = {}
    for session, turns in (("7", 2), ("3", 1)):
        folder = tmp_path / "images" / session
        folder.mkdir(parents=True)
        picture(0).save(folder / f"{session}-input.png")
        sessions[session] = []
        for turn in range(1, turns + 1):
            picture(10 * turn).save(folder / f"{session}-output{turn}.png")
            mask = picture(0).convert("RGBA")
            mask.paste((0, 0, 0, 0), (0, 0, 8 * turn, 32))
            mask.save(folder / f"{session}-mask{turn}.png")
            source = f"{session}-input.png" if turn == 1 else f"{session}-output{turn - 1}.png"
            names = {"input": source, "mask": f"{session}-mask{turn}.png", "output": f"{session}-output{turn}.png"}
            sessions[session].append(names | {"instruction": f"Edit {turn}."})
    (tmp_path / "edit_sessions.json").write_text(json.dumps(sessions))
    captions = {"7": {"7-output1.png": "one", "7-output2.png": "two"}, "3": {"3-output1.png": "three"}}
    (tmp_path / "local_descriptions.json").write_text(json.dumps(captions))
    return tmp_path


def test_the_authors_archive(archive):
    rows = magicbrush_turns(str(archive))
    assert rows["key"] == ["7-1", "7-2", "3-1"] and rows["session"] == ["7", "7", "3"] and rows["turn"] == [1, 2, 1]
    assert rows["caption"] == ["one", "two", "three"] and rows["instruction"] == ["Edit 1.", "Edit 2.", "Edit 1."]
    second = read_example(rows[1])
    assert second.source.getpixel((0, 0)) == (10, 0, 0) and second.target.getpixel((0, 0)) == (20, 0, 0)
    assert (np.asarray(second.mask) > 127).mean() == 0.5  # transparent is edited


def test_captions_may_lack_or_have_the_other_name(archive):
    (archive / "local_descriptions.json").rename(archive / "local_captions.json")
    assert magicbrush_turns(str(archive))["caption"] == ["one", "two", "three"]
    (archive / "local_captions.json").unlink()
    assert magicbrush_turns(str(archive))["caption"] == [None, None, None]


def test_a_table_comes_in_sessions(tmp_path):
    rows = [("7", 2), ("3", 1), ("7", 1)]
    table = Dataset.from_dict(
        {
            "img_id": [name for name, _ in rows],
            "turn_index": [turn for _, turn in rows],
            "source_img": [picture(10 * turn) for _, turn in rows],
            "target_img": [picture(10 * turn + 10) for _, turn in rows],
            "instruction": [f"{name} {turn}" for name, turn in rows],
        }
    )
    table.to_parquet(tmp_path / "dev.parquet")
    found = magicbrush_turns(str(tmp_path / "dev.parquet"))
    assert found["key"] == ["7-1", "7-2", "3-1"] and found["instruction"] == ["7 1", "7 2", "3 1"]
    assert found["caption"] == [None] * 3
    assert [read_example(row).source.getpixel((0, 0))[0] for row in found] == [10, 20, 10]
    table.remove_columns("img_id").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no column img_id"):
        magicbrush_turns(str(tmp_path / "other.parquet"))
    table.select([0, 1]).to_parquet(tmp_path / "part.parquet")
    with pytest.raises(ValueError, match="session 7 has turn 2 where 1 should be"):
        magicbrush_turns(str(tmp_path / "part.parquet"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "../../edit_sessions.json"}, "leads outside"),
        ({"output": None}, "7-1: output is None, expected a relative path"),
        ({"instruction": 5}, "7-1 is .* expected an object with an instruction"),
    ],
)
def test_a_bad_turn_is_named(archive, change, message):
    path = archive / "edit_sessions.json"
    sessions = json.loads(path.read_text())
    sessions["7"][0] |= change
    path.write_text(json.dumps(sessions))
    with pytest.raises(BadRecord, match=message):
        magicbrush_turns(str(archive))


def test_an_empty_archive_is_an_error(archive):
    (archive / "edit_sessions.json").write_text("{}")
    with pytest.raises(ValueError, match="no session"):
        magicbrush_turns(str(archive))


RECORD = {
    "image_path": "0_random_140/000000000000.jpg",
    "original_prompt": "a bicycle",
    "editing_prompt": "a [rusty] bicycle",
    "editing_instruction": "Make it rusty",
    "mask": [0, 3, 1000, 2],
}


def test_pie_bench(tmp_path):
    (tmp_path / "mapping_file.json").write_text(json.dumps({"000000000000": RECORD}))
    (row,) = pie_bench(tmp_path)
    assert (
        row["key"] == "000000000000" and row["instruction"] == "Make it rusty" and row["caption"] == "a rusty bicycle"
    )
    assert row["image"]["path"] == str(tmp_path / "annotation_images" / RECORD["image_path"])
    assert row["mask_runs"] == RECORD["mask"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": [1]}, "expected a list of start, length"),
        ({"mask": [-1, 2]}, "expected a list of start, length"),
        ({"editing_prompt": None}, "expected texts"),
        ({"image_path": "/etc/passwd"}, "leads outside"),
    ],
)
def test_a_bad_pie_record_is_named(tmp_path, change, message):
    (tmp_path / "mapping_file.json").write_text(json.dumps({"000000000000": RECORD | change}))
    with pytest.raises(BadRecord, match=message):
        pie_bench(tmp_path)


def test_masks_are_runs_of_start_and_length_with_an_edited_border():
    border = 4 * 512 - 4
    assert decode_mask([]).sum() == border and not decode_mask([])[1:-1, 1:-1].any()
    mask = decode_mask([512 + 5, 3, 2 * 512 + 510, 4])
    assert mask.shape == (512, 512) and mask.dtype == bool
    assert np.argwhere(mask[1:-1, 1:-1]).tolist() == [[0, 4], [0, 5], [0, 6], [1, 509], [2, 0]]  # goes on below
    assert decode_mask([512 * 512 - 600, 10_000]).sum() > border  # ends with the picture
    assert decode_mask([0, 512 * 512]).all()
