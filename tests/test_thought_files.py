"""The original's files of thoughts: read and written as its own code does, and refused by line where they are not."""

import json

import pytest
from conftest import GOLDEN_ROOT

from thinkclearly.data.sources import BadRecord
from thinkclearly.data.thought_files import DECODED, Prompt, detokenize, read_decoded, read_prompts, write_lines
from thinkclearly.models.chameleon.processor import ChameleonProcessor

ROOT = GOLDEN_ROOT / "chameleon_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]


@pytest.fixture(scope="module")
def values():
    return json.loads((ROOT / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def processor():
    return ChameleonProcessor.from_pretrained(ROOT / "checkpoint")


def lines(folder, *records):
    path = folder / "prompts.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_the_text_of_every_run_is_the_original_detokenizers(processor, values):
    for name, run in values["runs"].items():
        text, pictures = detokenize(processor, run["response"])
        assert text == run["text"], name
        assert len(pictures) == len(run["image_files"]) and None not in pictures


def test_pictures_that_are_not_whole_are_marked_and_counted(processor, values):
    expected = values["detokenize_malformed"]
    text, pictures = detokenize(processor, expected["response"])
    assert text == expected["text"]
    assert [codes is None for codes in pictures] == [file is None for file in expected["image_files"]]


def test_a_picture_with_a_word_among_its_codes_is_not_whole(processor):
    ids = processor.picture_ids([0] * processor.num_image_tokens)
    assert detokenize(processor, ids) == ("<image_0>", [(0,) * processor.num_image_tokens])
    ids[5] = processor.eos_id
    assert detokenize(processor, ids) == ("<invalid_image_0>", [None])


def test_codes_are_looked_up_and_not_counted(processor):
    codes = [k % len(processor.code_ids) for k in range(processor.num_image_tokens)]
    assert detokenize(processor, processor.picture_ids(codes))[1] == [tuple(codes)]


def test_prompts_pictures_and_answers_are_read(tmp_path):
    path = lines(tmp_path, {"prompt": "A kite."}, "", {"prompt": "<image>At night.", "images": ["a.png"]})
    assert read_prompts(path) == [Prompt("A kite."), Prompt("<image>At night.", (tmp_path / "a.png",))]
    path = lines(tmp_path, {"prompt": "A kite.", "response": [0, 5, 2]})
    assert read_prompts(path) == [Prompt("A kite.", (), (0, 5, 2))]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not a JSON object"),
        ({"text": "A kite."}, "expected an object with a 'prompt'"),
        ({"prompt": " "}, "expected an object with a 'prompt'"),
        ({"prompt": "A kite.", "images": "a.png"}, "expected a list of paths"),
        ({"prompt": "A kite.", "images": ["../a.png"]}, "leads outside"),
        ({"prompt": "<image><image>", "images": ["a.png"]}, "2 <image> and 1 images"),
        ({"prompt": "A kite.", "response": [1, "2"]}, "expected a list of token ids"),
        ({"prompt": "A kite.", "response": [-1]}, "expected a list of token ids"),
    ],
)
def test_a_bad_line_is_named(tmp_path, record, message):
    path = lines(tmp_path, {"prompt": "A kite."}, record)
    with pytest.raises(BadRecord, match=rf"prompts\.jsonl:2: .*{message}"):
        read_prompts(path)


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(BadRecord, match="cannot be read as JSON lines"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(lines(tmp_path))


def test_decoded_results_come_back_as_they_were_written(tmp_path):
    rows = [
        {"sample_id": 0, "text": "é <image_0>", "image_paths": ["0/image_0.png"], "seed": 3},
        {"sample_id": 1, "text": "<invalid_image_0>", "image_paths": [None]},
        {"sample_id": 2, "text": "Line\u2028ends\x85 of other kinds.\n", "image_paths": []},
    ]
    write_lines(tmp_path / "decoded.jsonl", rows)
    assert read_decoded(tmp_path / "decoded.jsonl") == rows
    assert list(rows[1]) == list(DECODED)
    for bad in ('{"sample_id": 0}', "[]", '{"sample_id": "0", "text": "", "image_paths": []}', "{"):
        (tmp_path / "decoded.jsonl").write_text(json.dumps(rows[0]) + "\n" + bad + "\n", encoding="utf-8")
        with pytest.raises(BadRecord, match="decoded.jsonl:2: found .*sample_id, text, image_paths"):
            read_decoded(tmp_path / "decoded.jsonl")
    write_lines(tmp_path / "decoded.jsonl", [rows[0] | {"image_paths": ["../image.png"]}])
    with pytest.raises(BadRecord, match="decoded.jsonl:1: image_paths .*leads outside"):
        read_decoded(tmp_path / "decoded.jsonl")
