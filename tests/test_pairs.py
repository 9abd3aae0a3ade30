"""Pairs of prompts: the built-in ones, and those of the original's files and of captioned edits."""

import re

import numpy as np
import pytest

from thinkclearly.data.pairs import KINDS, PROMPTS, shape_pairs
from thinkclearly.data.shapes import Scene
from thinkclearly.data.sources import PARTS
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
