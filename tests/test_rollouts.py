"""Samples of GRPO: the same whatever else is in the batch, ground truth as it is encoded, and rewards for each."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.settings import EditSettings
from thinkclearly.generation.draw import to_pictures
from thinkclearly.images import center_crop
from thinkclearly.models.finetunes import TINY_CLEAR, load_base, load_clear_model
from thinkclearly.sequence import FULL, UNCOND
from thinkclearly.training.rollouts import OWN, PARTNERS, Stopwatch, draw_samples, edit_samples, judge

SETTINGS = EditSettings(cfg_weight=1.0)
EDITS = EditSettings(cfg_weight=1.0, cfg_weight2=0.0, sample_gate=True)


@pytest.fixture(scope="module")
def base(golden):
    return load_base(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def tiny_clear():
    return load_clear_model(TINY_CLEAR)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A pair with pictures that are not square, one prompt alone, and a pair without pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng, images = np.random.default_rng(0), []
    for name, shape in (("first", (150, 120, 3)), ("second", (100, 260, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{name}.png")
        images.append({"path": str(folder / f"{name}.png"), "bytes": None})
    pair = {"key": "a", "prompts": ["A red star.", "A blue star."], "images": images, "scene": ["1", "2"]}
    alone = {"key": "b", "prompts": ["A dog."], "images": [], "scene": []}
    return [pair, alone, {"key": "c", "prompts": ["A cat.", "Two cats."], "images": [], "scene": []}]


@pytest.fixture(scope="module")
def edits():
    photos, found = packaged_photos("train"), []
    for i in range(2):
        edit = random_edit(5, i, photos)
        source, target, _ = edit.render(64)
        row = {"key": f"edit {i}", "instruction": edit.instruction, "source": source, "target": target, "mask": None}
        found.append(row | {"edit": edit.to_json()})
    return found


def drawn(pair, records, count=3, seed=7, truth=False, settings=SETTINGS):
    return draw_samples(*pair, records, settings, count, seed, lambda key: truth, Stopwatch(torch.device("cpu")))


def edited(pair, edits, count=2, seed=7):
    return edit_samples(*pair, edits, EDITS, count, seed, Stopwatch(torch.device("cpu")))


# ---- drawing -----------------------------------------------------------------------------------------------------


def test_samples_lie_prompt_by_prompt_and_a_pairs_prompts_share_a_group(base, records):
    found = drawn(base, records)
    words = ["A red star.", "A blue star.", "A dog.", "A cat.", "Two cats."]
    assert found.prompts == [each for each in words for _ in range(3)] and len(found) == 15
    assert found.groups.tolist() == [0] * 6 + [1] * 3 + [2] * 6
    assert found.columns["scene"] == ["1"] * 3 + ["2"] * 3 + [None] * 9
    assert found.columns["key"] == ["a"] * 6 + ["b"] * 3 + ["c"] * 6
    assert found.truths == [""] * 15 and found.logps.isfinite().all()
    for picture, expected in zip(found.pictures, to_pictures(base[0], found.class_ids)):
        assert picture.size == (96, 96)
        assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1
    assert len({tuple(row) for row in found.class_ids.tolist()}) == 15, "no noise is used twice"


def test_a_records_samples_are_the_same_whatever_else_is_in_the_batch(base, records):
    together = drawn(base, records)
    alone = [drawn(base, [record]) for record in records]
    assert torch.equal(torch.cat([each.class_ids for each in alone]), together.class_ids)
    torch.testing.assert_close(torch.cat([each.logps for each in alone]), together.logps, atol=1e-4, rtol=1e-4)
    backwards = drawn(base, records[::-1])
    assert torch.equal(backwards.class_ids[-6:], together.class_ids[:6])
    assert torch.equal(drawn(base, records[1:2], count=2).class_ids, together.class_ids[6:8])
    assert not torch.equal(drawn(base, records[1:2], seed=8).class_ids, together.class_ids[6:9])


def test_ground_truth_takes_the_last_places_as_the_crop_that_is_encoded(base, records):
    found, without = drawn(base, records, count=4, truth=True), drawn(base, records, count=4)
    assert found.truths == ["", "", OWN, PARTNERS] * 2 + [""] * 12, "where there are no pictures, nothing is shown"
    first, second = (center_crop(Image.open(picture["path"]).convert("RGB"), 96) for picture in records[0]["images"])
    for place, crop in {2: first, 3: second, 6: second, 7: first}.items():
        assert found.pictures[place].tobytes() == crop.tobytes()
        codes = base[0].token_model.encode(base[1].pixel_values([crop]))
        assert torch.equal(found.class_ids[place], codes[0]) and found.logps[place].isnan().all()
    drawn_places = [i for i, truth in enumerate(found.truths) if not truth]
    assert torch.equal(found.class_ids[drawn_places], without.class_ids[drawn_places]), "the others are not moved"
    assert found.logps[drawn_places].isfinite().all()


def test_one_prompt_with_its_picture_has_its_own_alone(base, records):
    record = {"key": "d", "prompts": ["A star."], "images": records[0]["images"][:1], "scene": []}
    assert drawn(base, [record], count=2, truth=True).truths == ["", OWN]


def test_nothing_left_to_draw_beside_ground_truth_is_an_error_that_names_the_record(base, records):
    with pytest.raises(ValueError, match="a: num_generations=2 leaves nothing to draw beside 2.*give 3 or more"):
        drawn(base, records, count=2, truth=True)


def test_a_picture_that_is_gone_is_named(base, records):
    gone = records[0] | {"images": [records[0]["images"][0], {"path": "/nowhere/b.png", "bytes": None}]}
    with pytest.raises(ValueError, match="a: partner's picture"):
        drawn(base, [gone], truth=True)


# ---- rewards -----------------------------------------------------------------------------------------------------


def test_a_reward_sees_words_pictures_and_columns_and_may_not_apply(base, records):
    found, seen = drawn(base, records[:2]), []

    def brightness(prompts, completions, scene, **columns):
        seen.append((prompts, sorted(columns), scene))
        return [None if text is None else np.asarray(picture).mean() for picture, text in zip(completions, scene)]

    judge(found, {"brightness": brightness, "prompt": lambda prompts, **rest: [len(words) for words in prompts]})
    assert seen == [(found.prompts, ["key"], ["1"] * 3 + ["2"] * 3 + [None] * 3)]
    bright = [np.asarray(picture).mean() for picture in found.pictures[:6]]
    expected = torch.tensor([*bright, *[math.nan] * 3], dtype=torch.float32)
    torch.testing.assert_close(found.rewards["brightness"], expected, equal_nan=True)
    assert found.rewards["prompt"].tolist() == [len(words) for words in found.prompts]


def test_a_reward_of_another_number_than_there_are_pictures_is_an_error(base, records):
    with pytest.raises(ValueError, match="reward short returned 1 rewards for 3 pictures; expected one for each"):
        judge(drawn(base, records[1:2]), {"short": lambda **_: [1.0]})


# ---- shown to the model again ------------------------------------------------------------------------------------


def test_rows_of_some_samples_are_those_of_all(base, records):
    found = drawn(base, records)
    index = torch.tensor([7, 2])
    some = found.model_inputs(index, base[1], (FULL, UNCOND))
    assert torch.equal(some["labels"], found.class_ids[[7, 7, 2, 2]])
    words = [base[1].tokenizer.decode(ids) for ids in some["input_ids"]]
    assert "A dog." in words[0] and "A red star." in words[2]
    assert not any(word in words[row] for row in (1, 3) for word in ("dog", "star"))


# ---- edits -------------------------------------------------------------------------------------------------------


def test_edits_are_groups_of_results_at_the_sources_size_with_what_rewards_need(tiny_clear, edits):
    found = edited(tiny_clear, edits)
    assert found.groups.tolist() == found.shown.tolist() == [0, 0, 1, 1]
    assert found.prompts == [edit["instruction"] for edit in edits for _ in range(2)]
    assert {picture.size for picture in found.pictures} == {(64, 64)}
    assert found.columns.keys() == {"key", "edit", "source"} and found.columns["edit"][::2] == [
        e["edit"] for e in edits
    ]
    copied = tiny_clear[0].vocabulary.is_instruction(found.class_ids)
    assert 0 < copied.sum() < copied.numel() and found.logps.isfinite().all()
    single = Editor(*tiny_clear, EDITS).edit_many(
        [edits[1]["source"]], [edits[1]["instruction"]], num_images=2, seed=[5], keep_logps=True
    )
    assert found.transformed.shape == (4, 1, len(single[0].class_ids))
    assert torch.equal(found.transformed[2, 0], single[0].source_tokens), "a copied patch is fed back as the source's"
    assert torch.equal(found.source_tokens[1], single[0].source_tokens)


def test_an_edits_samples_are_the_same_whatever_else_is_in_the_batch(tiny_clear, edits):
    together, alone = edited(tiny_clear, edits), [edited(tiny_clear, [edit]) for edit in edits]
    assert torch.equal(torch.cat([each.class_ids for each in alone]), together.class_ids)
    for one, other in zip([p for each in alone for p in each.pictures], together.pictures):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_an_edits_rows_show_its_source(tiny_clear, edits):
    found = edited(tiny_clear, edits)
    batch = found.model_inputs(torch.tensor([3, 0]), tiny_clear[1], (FULL,))
    assert batch["pictures"].tolist() == [[1], [0]] and batch["transformed"].shape[0] == 2
    one = found.model_inputs(torch.tensor([3, 2]), tiny_clear[1], (FULL,))
    assert one["pictures"].tolist() == [[0], [0]] and len(one["source_tokens"]) == len(one["features"]) == 1
    assert torch.equal(one["source_tokens"][0], found.source_tokens[1])
