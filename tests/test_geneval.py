"""GenEval: its prompts and rules on hand-made objects, and the whole benchmark with random towers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_towers import save_clip, save_mask2former
from torch.nn.functional import normalize

from thinkclearly import cli
from thinkclearly.data.sources import BadRecord
from thinkclearly.evaluation.benchmarks.detector import ColourNamer, Detector, cut_out
from thinkclearly.evaluation.benchmarks.geneval import (
    CLASSES,
    COLOURS,
    Found,
    judge,
    read_items,
    relative_position,
    summarise,
)
from thinkclearly.evaluation.benchmarks.towers import Clip

RECORDS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "clock", "count": 1, "color": "red"},
            {"class": "tv remote", "count": 1, "color": "black"},
        ],
        "prompt": "a photo of a red clock and a black tv remote",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "clock", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a clock left of a dog",
    },
]


def write(folder, records):
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prompts"), RECORDS)


@pytest.fixture(scope="module")
def items(path):
    return {item.tag: item for item in read_items(path)}


def clock(score=0.95, left=0, name="clock"):
    return Found(name, score, (left, 0, left + 10, 10))


def no_colours(_):
    raise AssertionError("nobody asked for colours")


# ---- rules -------------------------------------------------------------------------------------------------------


def test_there_are_cocos_classes_in_their_order():
    assert len(set(CLASSES)) == 80
    assert (CLASSES[0], CLASSES[64], CLASSES[79]) == ("person", "computer mouse", "toothbrush")


@pytest.mark.parametrize(("score", "reason"), [(0.31, ""), (0.3, "expected bench>=1, found 0")])
def test_an_object_counts_above_the_threshold(items, score, reason):
    assert judge(items["single_object"], [clock(score, name="bench")], no_colours) == reason


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([0.95, 0.91], ""),
        ([0.95, 0.91, 0.9, 0.89], ""),  # where objects are counted, only the surest are
        ([0.95, 0.9], "expected clock>=2, found 1"),
        ([0.95, 0.91, 0.92], "expected clock<3, found 3"),
    ],
)
def test_as_many_as_asked_for_and_no_more(items, scores, reason):
    assert judge(items["counting"], [clock(score) for score in scores], no_colours) == reason


def test_no_more_than_sixteen_of_a_class_count(items, tmp_path):
    many = {"tag": "counting", "include": [{"class": "clock", "count": 17}], "prompt": "seventeen clocks"}
    (item,) = read_items(write(tmp_path, [many]))
    assert judge(item, [clock()] * 20, no_colours) == "expected clock>=17, found 16"


def test_colours_are_those_of_the_surest_objects(items):
    red, blue, remote = clock(0.8), clock(0.9), clock(0.5, name="tv remote")
    colours = {red: "red", blue: "blue", remote: "black"}

    def name(found):
        return [colours[each] for each in found]

    assert judge(items["color_attr"], [red, remote], name) == ""
    assert judge(items["color_attr"], [red, blue, remote], name) == "expected red clock>=1, found blue"
    colours[remote] = "white"
    assert judge(items["color_attr"], [red, remote], name) == "expected black tv remote>=1, found white"


def test_places_are_those_of_the_surest_objects(items):
    dog = clock(0.5, left=50, name="dog")
    assert judge(items["position"], [clock(0.9, left=0), dog], no_colours) == ""
    found = judge(items["position"], [clock(0.9, left=0), clock(0.95, left=90), dog], no_colours)
    assert found == "expected clock left of target, found right of"
    missing = judge(items["position"], [clock(0.9)], no_colours)
    assert missing == "expected dog>=1, found 0; no target for clock to be left of"


@pytest.mark.parametrize(
    ("x", "y", "where"),
    [
        (-30, 0, {"left of"}),
        (30, 4, {"right of"}),
        (0, -30, {"above"}),
        (-4, 30, {"below"}),
        (-30, -30, {"left of", "above"}),
        (2, 1, set()),  # a tenth of both sizes is 2
        (4, 0, set()),  # (4 - 2) / 4 is not more than half
        (5, 0, {"right of"}),
        (30, 16, {"right of"}),  # (16 - 2) / 34 is not
    ],
)
def test_a_place_is_told_by_the_centres_less_a_tenth_of_the_sizes(x, y, where):
    assert relative_position((50 + x, 50 + y, 60 + x, 60 + y), (50, 50, 60, 60)) == where


def test_sizes_count_in_a_place():
    assert relative_position((0, 0, 100, 10), (60, 0, 160, 10)) == {"left of"}  # 60 off, less 20: two thirds
    assert relative_position((0, 0, 100, 10), (30, 0, 130, 10)) == set()  # 30 off, less 20: a third


def test_a_tag_is_the_share_of_its_pictures_and_the_overall_score_the_mean_of_tags():
    judged = [("counting", [True, False, False, False]), ("counting", [False] * 4), ("colors", [True] * 4)]
    assert summarise(judged) == {
        "images": {"counting": 1 / 8, "colors": 1.0, "overall": 9 / 16},
        "prompts": {"counting": 1 / 2, "colors": 1.0, "overall": 3 / 4},
    }


# ---- files -------------------------------------------------------------------------------------------------------


def test_the_authors_form_is_read(items):
    assert [item.prompt for item in items.values()] == [record["prompt"] for record in RECORDS]
    assert items["position"].include[1].position == ("left of", 0)
    assert items["color_attr"].include[1].colour == "black" and items["counting"].exclude[0].count == 3
    assert [json.loads(item.line) for item in items.values()] == RECORDS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "smell"}, "a tag of single_object"),
        ({"include": [{"class": "dragon", "count": 1}]}, "a class of GenEval's, not 'dragon'"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "a color of GenEval's, not 'mauve'"),
        ({"include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "a position of GenEval's"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "relative to an earlier object"),
        ({"include": [{"class": "dog"}]}, "'count'"),
        ({"include": []}, "a tag of"),
        ({"prompt": " "}, "a prompt"),
    ],
)
def test_a_bad_line_is_named(change, message, tmp_path):
    path = write(tmp_path, [RECORDS[0], RECORDS[0] | change])
    with pytest.raises(BadRecord, match=f"jsonl:2: .*{message}"):
        read_items(path)


# ---- towers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return save_mask2former(tmp_path_factory.mktemp("detector"), CLASSES, favoured=("bench", "clock", "tv remote"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    noise = [Image.fromarray(random.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(3)]
    return [*noise, Image.new("RGB", (96, 96), "red")]


def test_objects_have_masks_of_the_pictures_size_and_the_boxes_around_them(detector, pictures):
    detect = Detector(detector)
    found = detect(pictures)
    assert any(found) and [[each.name for each in detect([picture])[0]] for picture in pictures] == [
        [each.name for each in objects] for objects in found
    ]
    for each in (each for objects in found for each in objects):
        left, top, right, bottom = each.box
        assert each.name in CLASSES and each.score > 0.3 and each.mask.shape == (96, 96)
        inside = each.mask[top:bottom, left:right]
        assert inside.sum() == each.mask.sum() > 0
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_a_detector_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="knows 2 classes, the first 'cat'; expected COCO's 80"):
        Detector(save_mask2former(tmp_path, ("cat", "dog")))


def test_an_object_is_cut_out_with_grey_around_it():
    picture, mask = Image.new("RGB", (8, 8), "red"), np.zeros((8, 8), bool)
    mask[2:6, 3] = mask[2, 3:5] = True
    found = np.asarray(cut_out(picture, Found("dog", 1.0, (3, 2, 5, 6), mask)))
    assert found.shape == (4, 2, 3)
    assert (found[:, 0] == (255, 0, 0)).all() and (found[0] == (255, 0, 0)).all()
    assert (found[1:, 1] == 0x99).all()


def test_a_colour_is_the_one_whose_names_are_nearest(clip, pictures):
    tower = Clip(clip)
    boxes = [(0, 0, 40, 40), (20, 20, 96, 96), (50, 0, 96, 60)]
    found = [Found("tv remote", 1.0, box, np.ones((96, 96), bool)) for box in boxes]
    names = []
    for colour in COLOURS:
        texts = [f"a photo of a {colour} tv remote", f"a photo of a {colour}-colored tv remote"]
        names.append(normalize(tower.texts([*texts, f"a photo of a {colour} object"]).mean(0), dim=-1))
    vectors = tower.images([pictures[0].crop(box) for box in boxes])
    expected = (100 * vectors @ torch.stack(names).T).softmax(-1).argmax(-1)
    assert ColourNamer(tower)(pictures[0], found) == [COLOURS[number] for number in expected]


# ---- the command -------------------------------------------------------------------------------------------------


def run(*argv):
    try:
        cli.main(["evaluate", "--benchmark", "geneval", *(str(part) for part in argv)])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def argv(path, detector, clip):
    return ["--path", path, "--detector", detector, "--clip", clip, "--cfg_weight", 2, "--batch_size", 8]


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert run(*argv, "--output_dir", output) == 0
    return output


def test_four_pictures_a_prompt_are_judged_in_the_authors_folders(whole, items, detector, clip):
    names = sorted(str(file.relative_to(whole / "pictures")) for file in whole.rglob("*.png"))
    assert names == [f"{i:05d}/samples/{k:04d}.png" for i in range(4) for k in range(4)]
    assert json.loads((whole / "pictures" / "00003" / "metadata.jsonl").read_text()) == RECORDS[3]
    detect, colours, correct = Detector(detector), ColourNamer(Clip(clip)), {}
    for i, item in enumerate(items.values()):
        shown = [Image.open(whole / "pictures" / f"{i:05d}/samples/{k:04d}.png").convert("RGB") for k in range(4)]
        reasons = [
            judge(item, found, lambda group, picture=picture: colours(picture, group))
            for picture, found in zip(shown, detect(shown))
        ]
        correct[item.tag] = [not reason for reason in reasons]
    assert {True, False} == {each for row in correct.values() for each in row}
    expected = summarise(correct.items())
    results = json.loads((whole / "results.json").read_text())["results"]
    assert results == {name: {"model": {"pictures": 16, **shares}} for name, shares in expected.items()}
    lines = [json.loads(line) for line in (whole / "measured.jsonl").read_text().splitlines()][1:]
    assert all("expected" in reason for line in lines for reason in line["rows"]["wrong"] if reason)


def test_the_report_says_what_looked_and_that_it_is_not_the_authors(whole, detector):
    text = (whole / "results.md").read_text()
    assert "| this model | 16 |" in text and "| Janus-Pro-7B [JP] |" in text
    assert "4 pictures a prompt, seed 0, guidance 2, temperature 1, top_k all, top_p 1." in text
    assert f"Objects are found by {detector}, not by the authors' weights" in text
    assert "numbers need not match published ones" in text


def test_another_detector_looks_at_the_same_pictures(whole, argv, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*.png")}
    other = save_mask2former(tmp_path / "other", CLASSES, seed=1)
    assert run(*argv, "--detector", other, "--output_dir", whole) == 0
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*.png")} == before
    assert json.loads((whole / "results.json").read_text())["run"]["detector"] == other


def test_the_prompt_file_has_to_be_given(capsys):
    assert run() == 2
    assert "geneval needs --path: its evaluation_metadata.jsonl" in capsys.readouterr().err
