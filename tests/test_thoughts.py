"""Thoughts of the built-in shapes: what the words say is what the pictures show; and thoughts made of edits."""

import collections
import re

import datasets
import numpy as np
import pytest

from thinkclearly.data import sources, thoughts
from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import PALETTE, SHAPES, Scene
from thinkclearly.data.sources import OFFSETS, PARTS, BadRecord
from thinkclearly.data.thoughts import NOTHING_WRONG, THOUGHTS, critique, direct, from_edits, subgoals, thought_rows
from thinkclearly.images import load_image

COUNT, SIDE = 240, 64


@pytest.fixture(scope="module")
def critiques():
    return [critique(5, index) for index in range(COUNT)]


def kinds_of(found, wanted):
    """The mistakes of a scene, as one sees them by comparing."""
    kinds = ["background"] * (found.background != wanted.background)
    here, there = ({s.place: s for s in scene.shapes} for scene in (found, wanted))
    gone = [s for place, s in there.items() if place not in here]
    new = [s for place, s in here.items() if place not in there]
    for shape in list(gone):
        moved = [s for s in new if (s.name, s.colour, s.radius) == (shape.name, shape.colour, shape.radius)]
        if moved:
            kinds.append("place")
            gone.remove(shape)
            new.remove(moved[0])
    kinds += ["missing"] * len(gone) + ["extra"] * len(new)
    for place in here.keys() & there.keys():
        a, b = here[place], there[place]
        assert (a.x, a.y, a.radius) == (b.x, b.y, b.radius), "the jitter stays"
        kinds += ["colour"] * (a.colour != b.colour) + ["outline"] * (a.name != b.name)
    return sorted(kinds)


def test_the_last_picture_is_what_the_prompt_asks_for_and_a_wrong_one_is_not(critiques):
    for thought in critiques:
        first, last = thought.scenes
        assert thought.prompt == last.caption() and is_shown(last.render(SIDE), last)
        assert is_shown(first.render(SIDE), last) == (first == last), thought
        assert thought.edit_of == (-1, 0) and thought.response.count("<image>") == 2


def test_every_mistake_is_said_once_and_every_kind_comes_up(critiques):
    seen, right = collections.Counter(), 0
    for thought in critiques:
        (first, last), words = thought.scenes, thought.parts[1]
        kinds = kinds_of(first, last)
        if not kinds:
            assert words in NOTHING_WRONG
            right += 1
            continue
        patterns = [re.sub(r"{\w+}", r"(.+)", re.escape(w).replace("\\{", "{").replace("\\}", "}"))
                    for kind in kinds for w in thoughts.WORDINGS[kind]]  # fmt: skip
        one = "|".join(f"(?:{pattern})" for pattern in patterns)
        assert re.fullmatch(f"(?:{one})(?: (?:{one}))" + ("{0}" if len(kinds) == 1 else "{1}"), words), thought
        seen.update([f"{len(kinds)} mistakes", *kinds])
    assert 0.4 < right / COUNT < 0.6
    assert seen.keys() == {*thoughts.WORDINGS, "1 mistakes", "2 mistakes"} and min(seen.values()) >= 8, seen


def test_the_words_name_what_is_there_and_what_should_be(critiques):
    for thought in critiques:
        (first, last), words = thought.scenes, thought.parts[1]
        for kind in kinds_of(first, last):
            if kind == "background":
                assert last.background.name in words and first.background.name in words
            if kind in ("missing", "extra"):
                more, fewer = (last, first) if kind == "missing" else (first, last)
                shape = next(s for s in more.shapes if s.place not in {o.place for o in fewer.shapes})
                assert f"{shape.colour} {shape.name}" in words and f"at the {shape.place}" in words
        named = set(re.findall("|".join([*PALETTE, *SHAPES]), words))
        scenes = {
            w for s in (first, last) for w in (s.background.name, *(x for o in s.shapes for x in (o.colour, o.name)))
        }
        assert named <= scenes


def test_how_often_the_first_picture_is_wrong_can_be_chosen():
    for share in (0.0, 1.0):
        found = [critique(1, index, wrong=share) for index in range(20)]
        assert all((thought.scenes[0] != thought.scenes[1]) == bool(share) for thought in found)


def test_subgoals_draw_each_object_alone_where_it_will_stand_and_then_all():
    counts = collections.Counter()
    for index in range(60):
        thought = subgoals(5, index)
        *alone, whole = thought.scenes
        counts[len(alone)] += 1
        assert thought.prompt == whole.caption() and len(thought.scenes) <= 4
        assert [scene.shapes for scene in alone] == [(shape,) for shape in whole.shapes]
        assert {scene.background for scene in alone} == {whole.background}
        assert thought.edit_of == (-1,) * (len(alone) + 1)
        assert [isinstance(part, Scene) for part in thought.parts] == [False, True] * len(thought.scenes)
        for words, shape in zip(thought.parts[::2], whole.shapes):
            assert f"{shape.colour} {shape.name} at the {shape.place}" in words
    assert set(counts) == {2, 3}


def test_direct_is_the_picture_alone():
    thought = direct(5, 3)
    assert thought.response == "<image>" and thought.edit_of == (-1,) and thought.prompt == thought.scenes[0].caption()
    assert {len(direct(5, index).scenes[0].shapes) for index in range(30)} == {1, 2, 3}


@pytest.mark.parametrize("mode", thoughts.MAKERS)
def test_a_number_of_a_seed_is_always_the_same_and_parts_share_no_prompt_and_no_picture(mode):
    parts = {split: thought_rows(mode, 12, split, seed=7, size=48) for split in PARTS}
    for split, rows in parts.items():
        first = OFFSETS[split]
        assert rows.features == THOUGHTS
        assert rows["key"] == [f"{mode}[7:{number}]" for number in range(first, first + 12)]
        assert rows[:5] == thought_rows(mode, 5, split, seed=7, size=48)[:]
        assert rows["prompt"] != thought_rows(mode, 12, split, seed=8, size=48)["prompt"]
    for column in ("prompt", "scene"):
        values = [set(rows[column]) for rows in parts.values()]
        assert not set.intersection(*values[:2]) and not set.intersection(*values[1:])
    pictures = [{image["bytes"] for row in rows for image in row["images"]} for rows in parts.values()]
    assert not pictures[0] & pictures[1] and not pictures[0] & pictures[2] and not pictures[1] & pictures[2]


def test_rows_hold_the_pictures_that_the_scenes_render_to():
    (row,) = thought_rows("critique", 1, seed=7, size=48)
    thought = critique(7, 0)
    assert (row["prompt"], row["response"], row["edit_of"]) == (thought.prompt, thought.response, [-1, 0])
    for image, scene in zip(row["images"], thought.scenes):
        assert np.array_equal(np.asarray(load_image(image)), np.asarray(scene.render(48)))
    assert Scene.from_json(row["scene"]) == thought.scenes[-1]
    with pytest.raises(ValueError, match="mode='critic'.*expected critique, subgoals, general"):
        thought_rows("critic", 1)


def test_edits_become_critiques(own_cache):
    rows = sources.shapes(3, 48)
    found = from_edits(rows)
    assert found["key"] == rows["key"] and found["prompt"] == rows["instruction"] and found.features == THOUGHTS
    for row, edit in zip(found, rows):
        assert row["response"] == f"<image>{edit['instruction']}<image>" and row["edit_of"] == [-1, 0]
        assert [image["bytes"] for image in row["images"]] == [edit["source"]["bytes"], edit["target"]["bytes"]]
    captioned = from_edits(rows.add_column("caption", ["a hill", "", "a sea"]))
    assert captioned["prompt"] == ["a hill", rows["instruction"][1], "a sea"]
    bad = datasets.Dataset.from_list([{**rows[0], "instruction": " "}], features=sources.FEATURES)
    with pytest.raises(BadRecord, match="the instruction is empty"):
        from_edits(bad)


def test_prompts_may_ask_for_a_number_of_shapes():
    rows = thought_rows("critique", 6, shapes=(3, 4))
    assert [len(Scene.from_json(row["scene"]).shapes) for row in rows] == [3, 4] * 3
    assert [len(Scene.from_json(row["scene"]).shapes) for row in thought_rows("general", 2, shapes=(5,))] == [5, 5]


def test_a_first_picture_with_a_mistake_is_given_and_a_right_one_is_taught():
    for number in range(30):
        thought = critique(5, number)
        assert thought.given == int(thought.scenes[0] != thought.scenes[-1])
    assert subgoals(5, 0).given == direct(5, 0).given == 0
