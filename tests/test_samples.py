import json

import numpy as np
import pytest
import torch
from picture_pairs import noise

from thinkclearly.data.options import DataArguments
from thinkclearly.data.prepare import prepare_samples
from thinkclearly.data.samples import captioned_pictures, read_sample, sharegpt4o_samples
from thinkclearly.data.sources import BadRecord
from thinkclearly.data.splits import build_samples
from thinkclearly.images import Letterbox
from thinkclearly.models.load import load_checkpoint

N, GRID, SIDE = 36, 6, 96


@pytest.fixture(scope="module")
def checkpoint(golden):
    return load_checkpoint(str(golden / "checkpoint"))


MIXED = [
    {"input_prompt": "a red star", "output_image": "0.png"},
    {"input_prompt": "a blue star", "input_image": [], "output_image": "1.png"},
    {"input_prompt": "a green star", "input_image": None, "output_image": "2.png"},
    {"input_prompt": "make it night", "input_image": ["3.png"], "output_image": "4.png"},
    {"input_prompt": "put them together", "input_image": ["5.png", "6.png"], "output_image": "7.png"},
    {"input_prompt": "what is this?", "input_image": ["8.png"], "output_text": " A star. "},
    {"input_prompt": "which is larger?", "input_image": ["9.png", "0.png"], "output_text": "The first."},
]


def write(folder, records):
    """A JSON of records beside ten pictures, wide and high by turns."""
    folder.mkdir(exist_ok=True)
    for i in range(10):
        noise(i, *((60, 30) if i % 2 else (40, 60))).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


# ShareGPT-4o-Image's JSON


def test_pictures_from_words_edits_and_questions_stand_in_one_file(tmp_path):
    rows = sharegpt4o_samples(write(tmp_path, MIXED))
    samples = [read_sample(row) for row in rows]
    assert rows["key"][:] == [f"data.json[{i}]" for i in range(len(MIXED))]
    assert [len(sample.sources) for sample in samples] == [0, 0, 0, 1, 2, 1, 2]
    assert [sample.target is None for sample in samples] == [False] * 5 + [True] * 2
    assert [sample.answer for sample in samples] == [None] * 5 + ["A star.", "The first."]
    assert [sample.instruction for sample in samples] == [record["input_prompt"] for record in MIXED]
    assert [np.asarray(picture).tobytes() for picture in samples[4].sources] == [
        np.asarray(noise(5, 60, 30)).tobytes(),
        np.asarray(noise(6, 40, 60)).tobytes(),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a red star"], "found list, expected an object"),
        ({"input_prompt": 3, "output_image": "0.png"}, "input_prompt"),
        ({"input_prompt": "a star"}, "expected one of 'output_image' and 'output_text'"),
        ({"input_prompt": "a", "output_image": "0.png", "output_text": "b"}, "expected one of 'output_image'"),
        ({"input_prompt": "a", "input_image": "3.png", "output_image": "0.png"}, "'input_image' is str"),
        ({"input_prompt": "a", "input_image": ["../3.png"], "output_image": "0.png"}, "input_image"),
        ({"input_prompt": "a", "output_image": "/etc/passwd"}, "output_image"),
        ({"input_prompt": "a", "output_text": ["b"]}, "output_text"),
    ],
)
def test_a_malformed_record_is_named(record, message, tmp_path):
    with pytest.raises(BadRecord, match=r"data.json\[1\].*" + message):
        sharegpt4o_samples(write(tmp_path, [MIXED[0], record]))


def test_a_record_without_words_is_a_bad_one(tmp_path):
    rows = sharegpt4o_samples(write(tmp_path, [MIXED[0], {"output_image": "0.png"}]))
    with pytest.raises(BadRecord, match=r"^data.json\[1\]: the words are empty"):
        read_sample(rows[1])


def test_a_file_that_is_no_list_or_an_empty_one_is_refused(tmp_path):
    with pytest.raises(BadRecord, match="data.json"):
        sharegpt4o_samples(write(tmp_path, {"input_prompt": "a star"}))
    with pytest.raises(ValueError, match="data.json: no record"):
        sharegpt4o_samples(write(tmp_path, []))


# Captioned pictures


def captions(folder, lines):
    folder.mkdir()
    for line in lines:
        (folder / line["file_name"]).parent.mkdir(exist_ok=True)
        noise(len(line["file_name"])).save(folder / line["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_folder_of_captioned_pictures(tmp_path, own_cache):
    lines = [{"file_name": "one.png", "text": "a red star"}, {"file_name": "below/three.png", "text": "a blue star"}]
    samples = [read_sample(row) for row in captioned_pictures(captions(tmp_path / "data", lines))]
    found = {
        sample.instruction: (np.asarray(sample.target).tobytes(), sample.sources, sample.answer) for sample in samples
    }
    assert found == {line["text"]: (np.asarray(noise(len(line["file_name"]))).tobytes(), [], None) for line in lines}
    assert len({sample.key for sample in samples}) == 2


def test_pictures_without_captions_are_refused_with_a_line_to_write(tmp_path, own_cache):
    folder = captions(tmp_path / "data", [{"file_name": "one.png", "caption": "a star"}])
    for _ in range(2):
        with pytest.raises(ValueError, match="expected 'text'.*metadata.jsonl.*file_name"):
            captioned_pictures(folder)
        (folder / "metadata.jsonl").unlink(missing_ok=True)


def test_a_folder_without_pictures_is_refused(tmp_path, own_cache):
    with pytest.raises(ValueError, match="no pictures here"):
        captioned_pictures(tmp_path)


# Prepared


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    rows = sharegpt4o_samples(write(tmp_path_factory.mktemp("data") / "json", MIXED))
    return prepare_samples(rows, checkpoint, tmp_path_factory.mktemp("prepared"))


def codes(checkpoint, *numbers):
    pictures = [noise(i, *((60, 30) if i % 2 else (40, 60))) for i in numbers]
    squares = [Letterbox(*picture.size, SIDE).fit(picture) for picture in pictures]
    return torch.cat(
        [checkpoint.token_model.encode(checkpoint.processor.pixel_values([s])) for s in squares]
    ).flatten()


def test_columns_of_samples(prepared, checkpoint):
    assert set(prepared.column_names) == {
        "key", "instruction", "input_tokens", "output_tokens", "answer", "sources", "content", "pixel_difference",
        "origins",
    }  # fmt: skip
    assert prepared[0]["input_tokens"] == [] and len(prepared[0]["output_tokens"]) == N
    assert prepared[3]["input_tokens"] == codes(checkpoint, 3).tolist()
    assert prepared[3]["output_tokens"] == codes(checkpoint, 4).tolist()
    assert [len(row["sources"]) for row in prepared] == [0, 0, 0, 1, 2, 1, 2]


def test_several_pictures_keep_their_order(prepared, checkpoint):
    assert prepared[4]["input_tokens"] == codes(checkpoint, 5, 6).tolist()
    assert prepared[6]["input_tokens"] == codes(checkpoint, 9, 0).tolist()


def test_questions_have_an_answer_and_no_output(prepared):
    for row in prepared.select([5, 6]):
        assert row["output_tokens"] == [] and row["content"] == [] and row["answer"]
    assert prepared["answer"][:5] == [None] * 5


def test_content_is_where_the_target_lies_and_not_the_bars_beside_it(prepared):
    for number, size in ((0, (40, 60)), (1, (60, 30))):
        expected = Letterbox(*size, SIDE).content(GRID)
        content = np.reshape(prepared[number]["content"], (GRID, GRID))
        assert np.array_equal(content, expected) and 0 < content.sum() < N


def test_records_share_a_picture_whether_it_is_shown_or_drawn(prepared):
    origins = prepared["origins"][:]
    assert set(origins[0]) & set(origins[6]) and not set(origins[0]) & set(origins[4])


def test_bad_samples_are_skipped_and_the_rest_is_found_again(checkpoint, tmp_path, encoded_pictures):
    path = write(tmp_path / "data", MIXED)
    (path.parent / "5.png").write_bytes(b"broken")
    rows = sharegpt4o_samples(path)
    with pytest.raises(BadRecord, match=r"^data.json\[4\]: input 0"):
        prepare_samples(rows, checkpoint, tmp_path / "prepared")
    encoded_pictures.clear()
    for _ in range(2):
        found = prepare_samples(rows, checkpoint, tmp_path / "prepared", on_bad_record="skip")
        assert found["key"][:] == [f"data.json[{i}]" for i in (0, 1, 2, 3, 5, 6)]
        assert sum(encoded_pictures) == 7  # 0, 1, 2, 3, 4, 8 and 9


def test_held_out_samples_share_no_picture_with_those_trained_on(checkpoint, tmp_path):
    edits = [
        {"input_prompt": f"edit {i}", "input_image": [f"{i % 5}.png"], "output_image": f"{5 + i % 5}.png"}
        for i in range(20)
    ]
    path = write(tmp_path / "data", [*edits, *({"input_prompt": f"say {i}", "output_text": "yes"} for i in range(4))])
    options = {"source": "sharegpt4o", "path": str(path), "prepared_dir": str(tmp_path / "prepared")}
    found = build_samples(DataArguments(**options, eval_samples=5), checkpoint)
    assert found.calibration is None and len(found.train) + len(found.test) == 24 and 0 < len(found.test) <= 5
    trained, held_out = ({name for row in part["origins"] for name in row} for part in (found.train, found.test))
    assert not trained & held_out


def test_a_source_of_photo_pairs_alone_is_refused(checkpoint):
    with pytest.raises(ValueError, match="magicbrush has photo pairs alone; --method sft reads sharegpt4o, captions"):
        build_samples(DataArguments(source="magicbrush"), checkpoint)


# Pairs of prompts, each picture of which is drawn from its own


def pairs_of(folder, *more):
    """Five pairs with pictures, and more records."""
    pairs = [
        {f"{what}{i}": f"{2 * n + i - 1}{end}" for i in (1, 2) for what, end in (("prompt", ""), ("image", ".png"))}
        for n in range(5)
    ]
    path = write(folder, [*pairs, *more])
    return {"source": "pairs", "path": str(path), "prepared_dir": str(folder / "prepared")}


def test_each_picture_of_a_pair_is_drawn_from_its_prompt(checkpoint, tmp_path, encoded_pictures):
    options = pairs_of(tmp_path)
    for _ in range(2):
        found = build_samples(DataArguments(**options, eval_samples=2), checkpoint)
        assert sum(encoded_pictures) == 10  # and found again
    assert (len(found.train), len(found.test)) == (6, 4) and found.calibration is None
    for row in (*found.train, *found.test):
        assert row["output_tokens"] == codes(checkpoint, int(row["instruction"])).tolist()
        assert row["input_tokens"] == [] and row["answer"] is None
    partners = [{key.split(".json")[1].split(".")[0] for key in part["key"]} for part in (found.train, found.test)]
    assert not set.intersection(*partners) and sum(map(len, partners)) == 5


def test_pairs_without_pictures_cannot_be_drawn_from(checkpoint, tmp_path):
    options = pairs_of(tmp_path, {"prompt1": "a star", "prompt2": "a square"})
    with pytest.raises(BadRecord, match=r"^data.json\[5\].1: found neither, expected a picture to draw or an answer"):
        build_samples(DataArguments(**options, eval_samples=0), checkpoint)
    found = build_samples(DataArguments(**options, eval_samples=0, on_bad_record="skip"), checkpoint)
    assert len(found.train) == 10 and found.test is None


def test_the_built_in_shapes_are_drawn_from_their_captions(checkpoint, tmp_path):
    data = DataArguments(shapes_size=32, limit=6, eval_samples=2, prepared_dir=str(tmp_path))
    found = build_samples(data, checkpoint)
    assert (len(found.train), len(found.test)) == (12, 4)
    assert all(text.endswith("background") for text in found.train["instruction"])
    assert {len(row["output_tokens"]) for row in (*found.train, *found.test)} == {N}
