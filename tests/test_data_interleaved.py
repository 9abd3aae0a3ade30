"""Thoughts become streams: the original's files are read, and what cannot be used is named."""

import json
import logging

import numpy as np
import pytest
from conftest import GOLDEN_ROOT
from PIL import Image

from thinkclearly.data.interleaved import build_thoughts, read_thoughts, tokenize_thoughts
from thinkclearly.data.options import DataArguments
from thinkclearly.data.shapes import Scene
from thinkclearly.data.sources import BadRecord
from thinkclearly.data.thoughts import critique, thought_rows
from thinkclearly.images import patch_difference
from thinkclearly.models.chameleon.model import Chameleon
from thinkclearly.models.chameleon.processor import TEMPLATES
from thinkclearly.models.load import load_checkpoint

ROOT = GOLDEN_ROOT / "chameleon_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(str(ROOT / "checkpoint"))


@pytest.fixture
def write(tmp_path, checkpoint):
    """Records, or lines as they stand, to a JSONL file beside ten pictures of the model's side."""
    side, rng = checkpoint.processor.image_size, np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (side, 2 * side)).save(tmp_path / "tall.png")

    def write(*records):
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        (tmp_path / "thoughts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / "thoughts.jsonl"

    return write


def record(*images, prompt="Draw it.", response=None, **more):
    response = "It is.".join(["<image>"] * len(images)) if response is None else response
    return {"prompt": prompt, "response": response, "images": list(images), **more}


def tokenize(path, checkpoint, **options):
    return tokenize_thoughts(read_thoughts(path), checkpoint, path.parent / "prepared", **options)


def test_a_stream_is_prompt_sep_response_with_pictures_in_place(write, checkpoint, tmp_path):
    processor, n = checkpoint.processor, checkpoint.processor.num_image_tokens
    streams, left_out = tokenize(write(record("0.png", "1.png", key="mine"), record("2.png")), checkpoint)
    assert left_out == 0 and streams["key"] == ["mine", "thoughts.jsonl:2"]
    row = streams[0]
    ids = row["input_ids"]
    words = processor.encode_words("It is.", bos=False)
    prompt = [processor.bos_id, *processor.encode_words("Draw it.", bos=False), processor.sep_id]
    first, second = row["picture_starts"]
    assert ids[: row["response_start"]] == prompt and row["prompt_ids"] == prompt[1:-1]
    assert first == len(prompt) + 1 and ids[first + n + 1 : second - 1] == words
    assert [ids[i] for i in (first - 1, first + n, second - 1, second + n, -1)] == [
        processor.boi_id, processor.eoi_id, processor.boi_id, processor.eoi_id, processor.eos_id]  # fmt: skip
    for start, name in ((first, "0.png"), (second, "1.png")):
        square = processor.square(Image.open(tmp_path / name))
        codes = checkpoint.token_model.encode(processor.pixel_values([square]))[0]
        assert ids[start : start + n] == checkpoint.token_model.code_ids[codes].tolist()
    assert row["edit_of"] == [-1, -1] and not any(row["copied"]) and len(row["copied"]) == 2 * n


def test_unchanged_patches_of_an_edit_have_the_sources_ids(checkpoint, tmp_path):
    processor, n = checkpoint.processor, checkpoint.processor.num_image_tokens
    rows = thought_rows("critique", 6, seed=2, size=processor.image_size, wrong=1.0)
    streams, _ = tokenize_thoughts(rows, checkpoint, tmp_path)
    for i, row in enumerate(streams):
        first, last = (scene.render(processor.image_size) for scene in critique(2, i, wrong=1.0).scenes)
        same = patch_difference(first, last, processor.grid).ravel() <= 16
        assert not same.all() and row["copied"] == [False] * n + same.tolist()
        source, target = (np.array(row["input_ids"][s : s + n]) for s in row["picture_starts"])
        own = checkpoint.token_model.code_ids[checkpoint.token_model.encode(processor.pixel_values([last]))[0]].numpy()
        assert np.array_equal(target, np.where(same, source, own))
    by_codes, _ = tokenize_thoughts(rows, checkpoint, tmp_path, clear_label="tokens")
    assert by_codes["copied"] != streams["copied"]
    exact, _ = tokenize_thoughts(rows, checkpoint, tmp_path, pixel_tolerance=255)
    assert all(row["copied"] == [False] * n + [True] * n for row in exact)


def test_what_is_prepared_is_found_again_unless_the_words_would_differ(write, checkpoint, encoded_chameleon):
    path = write(record("0.png", "1.png"), record("2.png"))
    first, _ = tokenize(path, checkpoint)
    assert sum(encoded_chameleon) == 3
    again, _ = tokenize(path, checkpoint)
    assert sum(encoded_chameleon) == 3 and again[:] == first[:]
    tokenize(write(record("0.png", "1.png", prompt="Draw that."), record("2.png")), checkpoint)
    assert sum(encoded_chameleon) == 6


@pytest.fixture
def encoded_chameleon(monkeypatch):
    calls, real = [], Chameleon.encode

    def counting(model, pixels):
        calls.append(len(pixels))
        return real(model, pixels)

    monkeypatch.setattr(Chameleon, "encode", counting)
    return calls


def test_long_records_are_left_out_and_counted(write, checkpoint, caplog):
    path = write(record("0.png"), record("1.png", "2.png", "3.png"), record("4.png", response="<image>" + "so " * 99))
    lengths = [len(ids) for ids in tokenize(path, checkpoint)[0]["input_ids"]]
    assert len(set(lengths)) == 3
    with caplog.at_level(logging.WARNING):
        streams, left_out = tokenize(path, checkpoint, max_stream=max(lengths))
    assert left_out == 1 and max(lengths) not in [len(ids) for ids in streams["input_ids"]] and len(streams) == 2
    assert f"1 of 3 records have max_stream={max(lengths)} tokens or more" in caplog.text
    with pytest.raises(ValueError, match=f"max_stream=9: every record is longer, {min(lengths)} tokens at least"):
        tokenize(path, checkpoint, max_stream=9)


def test_tokens_of_others_are_compared_and_not_used(write, checkpoint, caplog):
    path = write(record("0.png"))
    ids = tokenize(path, checkpoint)[0][0]["input_ids"]
    codes = set(checkpoint.processor.code_ids)
    moved = [checkpoint.processor.code_ids[0] if token in codes else token for token in ids]
    for tokens, told in ((ids, False), (moved, False), (ids[:-2], True)):
        caplog.clear()
        found, _ = tokenize(write(record("0.png", tokens=tokens)), checkpoint)
        assert found[0]["input_ids"] == ids
        assert ("1 of 1 records bring `tokens` whose words differ" in caplog.text) is told


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{", "not a JSON object in UTF-8"),
        (b"[]", "found list, expected an object with prompt, response and images"),
        (b"\xff", "not a JSON object in UTF-8"),
        (record(prompt=None), "the prompt is '', expected words"),
        (record("0.png", prompt=3), "'prompt' is int, expected text"),
        (record("0.png", prompt="<image> again"), "expected words without <image>"),
        (record("0.png", response="No picture."), "0 <image> in the response, but 1 images"),
        (record(response="<image>"), "1 <image> in the response, but 0 images"),
        (record(response=" "), "the response is empty"),
        (record("0.png", 3), "'images' is ['0.png', 3], expected a list of str"),
        (record("../secret.png"), "leads outside"),
        (record("gone.png"), "picture 1"),
        (record("0.png", "1.png", edit_of=[-1, 1]), "edit_of is [-1, 1], expected"),
        (record("0.png", "1.png", edit_of=[-1]), "edit_of is [-1], expected"),
        (record("0.png", edit_of=["0"]), "'edit_of' is ['0'], expected a list of int"),
        (record("0.png", given=2), "'given' is 2, expected how many of its 1 pictures are given"),
        (record("0.png", "tall.png", edit_of=[-1, 0]), "of another shape"),
        (record("0.png", prompt="Two <reserved08706>."), "1 times '<reserved08706>', a control token"),
        (record("0.png", response="<image><racm3:break>"), "1 times '<racm3:break>', a control token"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(write, checkpoint, bad, message):
    path = write(record("0.png"), bad)
    with pytest.raises(BadRecord) as error:
        tokenize(path, checkpoint)
    assert "thoughts.jsonl:2" in str(error.value) and message in str(error.value)


def test_bad_records_can_be_skipped(write, checkpoint):
    path = write(record("0.png"), b"{", record("gone.png"), record("1.png"))
    rows = read_thoughts(path, on_bad_record="skip")
    streams, _ = tokenize_thoughts(rows, checkpoint, path.parent / "prepared", on_bad_record="skip")
    assert streams["key"] == ["thoughts.jsonl:1", "thoughts.jsonl:4"]
    with pytest.raises(ValueError, match="no usable record"):
        read_thoughts(write(b"{"), on_bad_record="skip")


# From options


def data(path=None, **options):
    given = {"source": "thoughts", "path": path and str(path), "eval_samples": 0, "calibration_edits": 0} | options
    return DataArguments(**given)


@pytest.mark.parametrize("mode", ["critique", "subgoals"])
def test_raw_prompts_get_the_originals_words_on_request(write, checkpoint, tmp_path, mode):
    path = write(record("0.png", prompt="A {p} star."))
    options = {"prepared_dir": str(tmp_path / "prepared")}
    found = build_thoughts(data(path, thought_mode=[mode], **options), checkpoint).train[0]
    asked = TEMPLATES[mode].replace("{p}", "A {p} star.")
    decode = checkpoint.processor.tokenizer.decode
    assert decode(found["input_ids"][1 : found["response_start"] - 1]) == asked
    assert decode(found["prompt_ids"]) == "A {p} star."
    # Where the file has them already, the bare prompt is found in it.
    same = build_thoughts(data(write(record("0.png", prompt=asked)), **options), checkpoint).train[0]
    assert (same["input_ids"], same["prompt_ids"]) == (found["input_ids"], found["prompt_ids"])


def test_held_out_records_share_no_picture_and_no_prompt_with_the_others(write, checkpoint, tmp_path):
    records = [record(f"{i % 5}.png", prompt=f"Number {i // 2}.") for i in range(10)]  # all hang together
    records += [record(f"{i}.png", prompt=f"Number {i}.") for i in range(5, 10)]
    options = {"eval_samples": 3, "prepared_dir": str(tmp_path / "prepared")}
    found = build_thoughts(data(write(*records), **options), checkpoint)
    assert len(found.test) == 3 and len(found.train) == 12 and found.calibration is None
    assert not {o for row in found.train["origins"] for o in row} & {o for row in found.test["origins"] for o in row}
    assert {int(key.split(":")[1]) for key in found.test["key"]} <= set(range(11, 16))
    found = build_thoughts(data(tmp_path / "thoughts.jsonl", calibration_edits=2, **options), checkpoint, True)
    assert len(found.calibration) == 2 and not set(found.calibration["key"]) & set(found.test["key"])


def test_shapes_think_in_the_kinds_that_are_asked_for(checkpoint, tmp_path):
    options = {"source": "shapes", "limit": 5, "eval_samples": 4, "calibration_edits": 2, "wrong_share": 1.0}
    options |= {"thought_mode": ["critique", "subgoals", "general"], "prepared_dir": str(tmp_path), "shapes_size": 64}
    found = build_thoughts(data(**options), checkpoint, calibration=True)
    kinds = {part: [key.split("[")[0] for key in getattr(found, part)["key"]] for part in ("train", "test")}
    assert kinds["train"] == ["critique"] * 2 + ["subgoals"] * 2 + ["general"] and len(kinds["test"]) == 4
    assert len(found.calibration) == 2 and build_thoughts(data(**options), checkpoint).calibration is None
    for row in found.train:
        kind, text = row["key"].split("[")[0], checkpoint.processor.tokenizer.decode(row["input_ids"][1:60])
        assert text.startswith(TEMPLATES[kind].removesuffix("{p}"))
        assert checkpoint.processor.tokenizer.decode(row["prompt_ids"]) == Scene.from_json(row["scene"]).caption()


def test_edits_and_captions_become_thoughts(checkpoint, tmp_path):
    for i in range(3):
        folder = tmp_path / "edits" / f"sample_{i:04d}"
        folder.mkdir(parents=True)
        for side in ("source", "target"):
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            noise[:32] = 0 if side == "source" else 255
            Image.fromarray(noise).save(folder / f"{side}.png")
        (folder / "metadata.json").write_text(json.dumps({"instruction": f"Make {i} white."}))
    found = build_thoughts(data(tmp_path / "edits", source="folder", prepared_dir=str(tmp_path)), checkpoint).train
    n = checkpoint.processor.num_image_tokens
    for i, row in enumerate(found):
        ids, processor = row["input_ids"], checkpoint.processor
        text = processor.tokenizer.decode(ids[1 : ids.index(processor.sep_id)])
        assert row["response_start"] == row["picture_starts"][0] + n + 1, "the photograph is given"
        assert text == TEMPLATES["critique"].replace("{p}", f"Make {i} white.")
        assert row["edit_of"] == [-1, 0] and row["copied"] == [False] * n + [False] * (n // 2) + [True] * (n // 2)
    (tmp_path / "captions").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "captions" / "a.png")
    (tmp_path / "captions" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "nothing"}\n')
    options = {"source": "captions", "prepared_dir": str(tmp_path)}
    (row,) = build_thoughts(data(tmp_path / "captions", **options), checkpoint).train
    assert len(row["picture_starts"]) == 1 and row["input_ids"][row["response_start"]] == checkpoint.processor.boi_id


def test_other_families_and_sources_are_refused_with_what_to_do(write, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="Chameleon, Anole, TwGI or tiny_chameleon as base_model"):
        tokenize(write(record("0.png")), load_checkpoint("tiny"))
    with pytest.raises(ValueError, match="--method interleaved reads thoughts, shapes, captions"):
        build_thoughts(data(tmp_path / "pairs.json", source="pairs"), checkpoint)
    with pytest.raises(ValueError, match="clear_label=mask: thoughts have no masks"):
        tokenize(write(record("0.png")), checkpoint, clear_label="mask")
    with pytest.raises(ValueError, match="thought_mode=.*takes one"):
        data(tmp_path / "t.jsonl", thought_mode=["critique", "subgoals"])
    with pytest.raises(ValueError, match="thought_mode.*means nothing for source: folder"):
        data(tmp_path, source="folder", thought_mode=["critique"])
