"""A file is whole or as it was before, and what is written as JSON is JSON."""

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from thinkclearly.files import A_DAY, new_folder, replacing, replacing_in, write_json, write_text


def test_a_failure_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a" / "file.txt", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "a" / "file.txt") as temporary:
        temporary.write_text("half")
        assert (tmp_path / "a" / "file.txt").read_text() == "old"
        raise KeyError
    assert [(path.name, path.read_text()) for path in (tmp_path / "a").iterdir()] == [("file.txt", "old")]


def test_the_new_file_takes_the_place_of_the_old(tmp_path):
    for text in ("old", "größer → neu"):
        write_text(tmp_path / "file.txt", text)
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["größer → neu"]


def test_threads_that_write_the_same_file_do_not_meet(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_text(tmp_path / "file.txt", f"{i}\n" * 1000), range(200)))
    lines = (tmp_path / "file.txt").read_text().splitlines()
    assert len(lines) == 1000 and len(set(lines)) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_whole_and_the_first_of_two_counts(tmp_path):
    with new_folder(tmp_path / "a") as slow:
        (slow / "file.txt").write_text("slow")
        with new_folder(tmp_path / "a") as fast:
            (fast / "file.txt").write_text("fast")
            assert not (tmp_path / "a").exists()
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["file.txt"]
    with pytest.raises(KeyError), new_folder(tmp_path / "b") as temporary:
        (temporary / "file.txt").write_text("half")
        raise KeyError
    assert (tmp_path / "a" / "file.txt").read_text() == "fast" and len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_left_goes_but_not_what_others_write_now(tmp_path):
    for name, age in (("old", 2 * A_DAY), ("new", 60)):
        (tmp_path / f".a.{name}.tmp").mkdir()
        os.utime(tmp_path / f".a.{name}.tmp", (time.time() - age,) * 2)
    with new_folder(tmp_path / "a"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.new.tmp", "a"]


def test_json_has_no_infinity(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, -math.inf, (math.inf, True, None)], "ü": math.nan})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": [1.5, "-inf", ["inf", True, None]], "ü": "nan"} and "ü" in text
    assert float(found["a"][1]) == -math.inf


def test_files_written_in_place_replace_the_old_ones_together(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("old")
    os.link(tmp_path / "run" / "a", tmp_path / "held")
    with pytest.raises(RuntimeError), replacing_in(tmp_path / "run") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (tmp_path / "run" / "a").read_text() == "old"
    with replacing_in(tmp_path / "run") as folder:
        (folder / "below").mkdir()
        for name in ("a", "below/b"):
            (folder / name).write_text("new")
    assert {path.name: path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()} == {
        "a": "new",
        "b": "new",
    }
    assert (tmp_path / "held").read_text() == "old"
