"""Editing at scale: every kind of input, nothing done twice, and a bad item is named."""

import json
import shutil
from pathlib import Path

import datasets
import icc
import numpy as np
import pytest
import torch
from PIL import Image

from thinkclearly import cli
from thinkclearly.data.shapes import packaged_photos
from thinkclearly.data.sources import BadRecord
from thinkclearly.editing import batch
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.settings import EditSettings
from thinkclearly.images import load_image
from thinkclearly.models.finetunes import load_clear_model

WORDS = "Make it blue."


@pytest.fixture(scope="module")
def editor(golden):
    return Editor(*load_clear_model(golden / "finetune", base=golden / "checkpoint"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five pictures of different shapes, one in a folder below."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i, path in enumerate(sorted(packaged_photos("train"))[:5]):
        name = f"more/{i}.png" if i == 4 else f"{i}.png"
        Image.open(path).convert("RGB").resize((60 + 10 * i, 80)).save(folder / name)
    return folder


def edit(editor, items, output, **options):
    return batch.edit_items(editor, items, output, run={"model": "golden"}, temperature=0.0, **options)


def write_jsonl(folder, *records):
    path = folder / "edits.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return str(path)


def test_a_folder_a_jsonl_and_a_data_set_give_the_same_items(photos, tmp_path):
    found, skipped = batch.read_items(str(photos), WORDS)
    assert skipped == [] and found["key"] == ["0.png", "1.png", "2.png", "3.png", "more/4.png"]
    lines = [{"image": key, "instruction": WORDS, "key": key} for key in found["key"]]
    lines[0].pop("instruction")
    from_lines, _ = batch.read_items(write_jsonl(photos, *lines), WORDS)
    assert from_lines[:] == found[:]
    Path(photos / "edits.jsonl").unlink()
    table = found.rename_columns({"image": "source_img", "instruction": "edit_prompt"})
    table.to_parquet(tmp_path / "edits.parquet")
    table.save_to_disk(tmp_path / "disk")
    for source in (tmp_path / "edits.parquet", tmp_path / "disk"):
        table, _ = batch.read_items(str(source))
        assert table["key"] == found["key"] and table["instruction"] == found["instruction"]
        pictures = [load_image(image) for image in table["image"]]
        assert [picture.size for picture in pictures] == [(60 + 10 * i, 80) for i in range(5)]


def test_results_are_those_of_single_edits_and_the_table_names_them(editor, photos, tmp_path):
    items, _ = batch.read_items(str(photos), WORDS)
    report = edit(editor, items, tmp_path, batch_size=2, num_images=2, seed=3)
    assert (report.items, report.edited, report.skipped) == (5, 5, [])
    table = datasets.Dataset.from_parquet(str(tmp_path / "results.parquet"), cache_dir=str(tmp_path / "cache"))
    assert [(row["key"], row["sample"]) for row in table] == [(key, k) for key in items["key"] for k in (0, 1)]
    row = table[9]
    alone = editor.edit(photos / "more/4.png", WORDS, num_images=2, seed=3, temperature=0.0)[1]
    assert row["fed_codes"] == alone.fed_codes.tolist() and row["clear_fraction"] == alone.clear_fraction
    assert row["instruction"] == WORDS and row["passes"] == alone.passes and row["seconds"] > 0
    assert Image.open(tmp_path / row["pixel_composite"]).tobytes() == alone.image.tobytes()
    assert (tmp_path / row["raw_model"]).is_file() and (tmp_path / row["clear_mask"]).is_file()


def test_an_interrupted_run_goes_on_where_it_stopped(editor, photos, tmp_path, monkeypatch):
    items, _ = batch.read_items(str(photos), WORDS)
    calls, edit_many = [], editor.edit_many

    def failing(pictures, *args, **options):
        calls.append(len(pictures))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return edit_many(pictures, *args, **options)

    monkeypatch.setattr(editor, "edit_many", failing)
    with pytest.raises(KeyboardInterrupt):
        edit(editor, items, tmp_path, batch_size=2)
    assert not (tmp_path / "results.parquet").exists()
    (tmp_path / ".2_png.tmp").mkdir()  # killed while writing
    kept = (tmp_path / "0_png" / "result.json").stat().st_mtime_ns
    assert edit(editor, items, tmp_path, batch_size=2).edited == 3
    assert calls == [2, 2, 2, 1] and kept == (tmp_path / "0_png" / "result.json").stat().st_mtime_ns
    assert edit(editor, items, tmp_path, batch_size=2).edited == 0
    others, _ = batch.read_items(str(photos), "Make it red.")
    assert edit(editor, others, tmp_path, batch_size=5).edited == 5, "other words are another edit"


FAST = {"use_cfg": False, "block": 64}


@pytest.fixture
def two(photos, tmp_path):
    """Two photographs that may be changed."""
    for name in ("0.png", "1.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        shutil.copy(photos / name, tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_a_replaced_photo_is_edited_anew_and_its_neighbour_is_not(editor, two, tmp_path, caplog):
    items, _ = batch.read_items(str(two), WORDS)
    assert edit(editor, items, tmp_path / "out", **FAST).edited == 2
    before = {name: (tmp_path / "out" / name / "result.json").stat().st_mtime_ns for name in ("0_png", "1_png")}
    Image.open(two / "1.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(two / "1.png")
    caplog.set_level("INFO")
    assert edit(editor, items, tmp_path / "out", **FAST).edited == 1
    assert "1 items have another picture or instruction than before: 1.png" in caplog.text
    after = {name: (tmp_path / "out" / name / "result.json").stat().st_mtime_ns for name in ("0_png", "1_png")}
    assert after["0_png"] == before["0_png"] and after["1_png"] > before["1_png"]
    saved = Image.open(tmp_path / "out" / "1_png" / "input_image.png")
    assert np.array_equal(saved, Image.open(two / "1.png"))
    (two / "1.png").write_bytes(b"no picture")
    report = edit(editor, items, tmp_path / "out", on_bad_record="skip", **FAST)
    table = datasets.Dataset.from_parquet(str(tmp_path / "out/results.parquet"), cache_dir=str(tmp_path / "cache"))
    assert report.edited == 0 and len(report.skipped) == 1 and table["key"] == ["0.png"], "no row of the old picture"


def test_another_model_gate_or_setting_is_refused_by_name(editor, two, tmp_path, golden):
    items, _ = batch.read_items(str(two), WORDS)
    edit(editor, items, tmp_path / "out", **FAST)

    def refused(changed, message, **options):
        with pytest.raises(ValueError, match=f"{message}.*Give another --output_dir"):
            edit(changed, items, tmp_path / "out", **FAST | options)

    refused(editor, r"settings.clear_bias=0.0 \(now 1.0\)", clear_bias=1.0)
    refused(Editor(editor.model, editor.processor, EditSettings(top_k=3)), r"settings.top_k=0 \(now 3\)")
    other = Editor(*load_clear_model(golden / "finetune", base=golden / "checkpoint"))
    other.model.clear_config.gate_bias = 0.25
    refused(other, r"clear_config.gate_bias=0.0 \(now 0.25\)")
    other.model.clear_config.gate_bias = 0.0
    with torch.no_grad():
        other.model.clear_head.bias += 0.5
    refused(other, "weights='")
    with pytest.raises(ValueError, match="seed=None .now 1"):
        batch.edit_items(editor, items, tmp_path / "out", run={"model": "golden", "seed": 1}, temperature=0.0, **FAST)
    same = batch.edit_items(editor, items, tmp_path / "out", run={"model": "moved"}, temperature=0.0, **FAST)
    assert same.edited == 0, "the same weights at another path"


def test_results_in_the_input_folder_are_no_input(editor, two, caplog):
    caplog.set_level("INFO")
    for output in (two / "red", two / "more" / "blue"):
        items, _ = batch.read_items(str(two), WORDS, output_dir=output)
        assert items["key"] == ["0.png", "1.png"]
        edit(editor, items, output, **FAST)
        assert len(list(two.rglob("*.png"))) > 2
    items, _ = batch.read_items(str(two), WORDS, output_dir=two / "red")
    assert items["key"] == ["0.png", "1.png"] and "16 pictures are results of editing, not input" in caplog.text
    with pytest.raises(ValueError, match="is the input and the output_dir"):
        batch.read_items(str(two), WORDS, output_dir=two)
    with pytest.raises(ValueError, match="found results of editing and no other picture"):
        batch.read_items(str(two / "more"), WORDS, output_dir="elsewhere")


def test_a_photo_s_colours_transparency_and_exif_reach_the_files(editor, two, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Ada"
    photo = Image.open(two / "0.png").convert("RGBA")
    photo.putalpha(100)
    photo.save(two / "0.png", icc_profile=icc.display_p3(), exif=exif)
    items, _ = batch.read_items(str(two), WORDS)
    edit(editor, items, tmp_path / "out", **FAST)
    found = Image.open(tmp_path / "out/0_png/pixel_composite.png")
    assert found.size == photo.size[::-1] and found.mode == "RGBA" and found.getchannel("A").getextrema() == (100, 100)
    assert found.info["icc_profile"] == icc.display_p3() and dict(found.getexif()) == {0x013B: "Ada"}


def test_a_bad_item_is_named_or_skipped(editor, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no picture")
    good = {"image": "0.png", "instruction": WORDS}
    bad = {"picture": "none.png"}, "{", {"image": "broken.png"}, {"image": "1.png", "instruction": " "}
    source = write_jsonl(photos, good, *bad, {"image": "../x.png"}, {"image": "1.png", "instruction": 3})
    with pytest.raises(BadRecord, match="edits.jsonl:2: found .*'image' and 'instruction'"):
        batch.read_items(source)
    items, skipped = batch.read_items(source, WORDS, on_bad_record="skip")
    assert [message.split(".jsonl:")[1][0] for message in skipped] == ["2", "3", "6", "7"]
    with pytest.raises(BadRecord, match="000004"):
        edit(editor, items, tmp_path / "stopped")
    report = edit(editor, items, tmp_path / "skipped", skipped=skipped, on_bad_record="skip")
    assert report.edited == 1 and len(report.skipped) == 6
    assert "000005: the instruction is empty" in report.skipped[5]
    assert json.loads((tmp_path / "skipped" / "skipped.json").read_text()) == report.skipped
    for name in ("broken.png", "edits.jsonl"):
        (photos / name).unlink()


def test_names_stay_inside_the_output_folder_and_apart(photos):
    source = write_jsonl(photos, {"image": "0.png", "key": "../../a"}, {"image": "1.png", "key": "/../../a"[1:]})
    with pytest.raises(ValueError, match="share the folder"):
        batch.read_items(source, WORDS)
    items, _ = batch.read_items(write_jsonl(photos, {"image": "0.png", "key": "../../a"}), WORDS)
    assert batch._folder(items[0]["key"]) == "______a"
    (photos / "edits.jsonl").unlink()


def test_a_data_set_s_rows_need_names(photos, tmp_path):
    table = datasets.Dataset.from_dict(
        {"key": ["a", ""], "image": [str(photos / "0.png")] * 2, "instruction": ["x"] * 2}
    )
    table.to_parquet(tmp_path / "edits.parquet")
    with pytest.raises(ValueError, match="row 1 has the key ''"):
        batch.read_items(str(tmp_path / "edits.parquet"))


def test_the_command_wants_one_picture_or_an_input(photos, capsys):
    for argv, message in (
        (["--instruction", "x"], "either --image"),
        (["--image", "a.png", "--input", "b", "--instruction", "x"], "either --image"),
        (["--input", "b", "--batch_size", "0"], "batch_size=0"),
        (["--input", "b", "--on_bad_record", "ignore"], "error, skip"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["edit", *argv])
        assert message in capsys.readouterr().err
