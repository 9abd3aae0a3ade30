"""What an evaluation of edits reports, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from thinkclearly.data import sources
from thinkclearly.data.sources import EditExample
from thinkclearly.editing.result import EditResult
from thinkclearly.evaluation.calibration import calibrated_log_odds
from thinkclearly.evaluation.edits import best_median_worst, evaluate_edits, judge_shapes
from thinkclearly.images import Letterbox
from thinkclearly.instructions import InstructionVocabulary

CODES = 8
CLEAR = CODES  # the class of the first instruction token


def plain(level, **boxes):
    """A grey picture of 16×16 pixels with rectangles (left, top, right, bottom) of other levels in it."""
    picture = Image.new("RGB", (16, 16), (level,) * 3)
    for name, box in boxes.items():
        picture.paste((int(name.strip("_")),) * 3, box)
    return picture


def result(*, image, raw, token_composite, input_decoded, ids, codes, gate, settings):
    """An edit of a picture of 2×2 patches whose source codes are 1, 3, 2 and 4."""
    ids = torch.tensor(ids)
    clear = (ids >= CLEAR).view(2, 2).numpy()
    made = EditResult(
        image=image,
        token_composite=token_composite,
        source=plain(100),
        mask=Image.fromarray(np.uint8(clear.repeat(8, 0).repeat(8, 1)) * 255),
        class_ids=ids,
        fed_codes=ids,
        codes=torch.tensor(codes),
        source_tokens=torch.tensor([1, 3, 2, 4]),
        gate=torch.tensor(gate),
        chosen=clear,
        clear=clear,
        clear_fraction=float(clear.mean()),
        letterbox=Letterbox(16, 16, 16),
        instruction="",
        seed=0,
        sample=0,
        settings={"guidance": "factorised", "feather_radius_px": 0.0, "feather": "inside"} | settings,
    )
    made.raw, made.input_decoded = raw, input_decoded
    return made


# The first edit: the target is lighter in 4×4 pixels of the top left patch, and 16 levels lighter in one pixel of the
# bottom right patch. The true mask is wider than the change: 8×4 pixels across the two upper patches. The model
# painted the top left and the bottom right patch; its composite has 190 where 200 was asked for.
TARGET = plain(100, **{"200": (4, 0, 8, 4), "116": (12, 12, 13, 13)})
MASK = Image.fromarray(np.uint8(np.pad(np.ones((4, 8)), ((0, 12), (4, 4)))) * 255)
FIRST = EditExample(plain(100), TARGET, "make it lighter", MASK, key="first")
FIRST_RESULT = result(
    image=plain(100, **{"190": (0, 0, 8, 8)}),
    raw=plain(110),
    token_composite=plain(105),
    input_decoded=plain(98),
    ids=[7, CLEAR, CLEAR, 5],
    codes=[7, 3, 6, 5],  # the second is the source's
    gate=[-3.0, 2.0, 1.5, -0.5],
    settings={"prefer": "exact", "clear_bias": 0.5},
)
# The second has no true mask, joint guidance, and a model that copies everything, where everything was to change.
SECOND = EditExample(plain(100), plain(200), "make all of it lighter", None, key="second")
SECOND_RESULT = result(
    image=plain(100),
    raw=plain(100),
    token_composite=plain(100),
    input_decoded=plain(100),
    ids=[CLEAR] * 4,
    codes=[1, 3, 2, 4],
    gate=[math.nan] * 4,
    settings={"guidance": "joint", "prefer": "balanced", "clear_bias": 0.0},
)


class Prepared:
    """An editor whose results lie ready, by instruction."""

    results = {FIRST.instruction: FIRST_RESULT, SECOND.instruction: SECOND_RESULT}
    processor = SimpleNamespace(image_size=16, grid=2)
    model = SimpleNamespace(vocabulary=InstructionVocabulary(CODES))

    def edit_many(self, pictures, instructions, seed):
        return [self.results[words] for words in instructions]


def light(key, picture):
    """A judge: the pixel (5, 1), which both edits were to make lighter, is light, and the first edit asked for it."""
    return key == "first" and picture.getpixel((5, 1))[0] > 150


@pytest.fixture(scope="module")
def first():
    return evaluate_edits(Prepared(), [FIRST], judge=light)


@pytest.fixture(scope="module")
def both():
    return evaluate_edits(Prepared(), [FIRST, SECOND], judge=light, batch_size=1)


# 32 of 256 pixels are inside the mask, of which the target changes 16 by 100 levels. Outside, the composite painted 48
# pixels 90 levels too light.
@pytest.mark.parametrize(
    ("row", "outside", "exact_outside", "inside", "whole"),
    [
        ("raw", 10**2, 0, (90**2 + 10**2) / 2, 10**2),
        ("token_composite", 5**2, 0, (95**2 + 5**2) / 2, 5**2),
        ("pixel_composite", 48 * 90**2 / 224, 176 / 224, 10**2 / 2, 90**2 / 4),
        ("copy_matching_tokens", 176 * 10**2 / 224, 48 / 224, 90**2 / 2, 3 * 10**2 / 4),
        ("input_decoded", 2**2, 0, (102**2 + 2**2) / 2, 2**2),
        ("copy_source", 0, 1, 100**2 / 2, 0),
    ],
)
def test_outside_is_compared_with_the_source_and_inside_with_the_target(
    first, row, outside, exact_outside, inside, whole
):
    found = first.pictures[row]
    assert found["mse_outside"] == found["mse_pooled_outside"] == pytest.approx(outside)
    assert found["exact_outside"] == pytest.approx(exact_outside)
    assert found["mse_inside"] == pytest.approx(inside)
    assert found["mse"] == pytest.approx(whole)
    assert (found["pixels"], found["pixels_inside"], found["pixels_outside"]) == (256, 32, 224)


def test_an_edit_without_a_mask_counts_in_the_whole_picture_only(both):
    found = both.pictures["raw"]
    assert found["pictures"] == 2 and found["pixels"] == 512 and found["pixels_outside"] == 224
    assert found["mse"] == (10**2 + 0) / 2 and found["mse_outside"] == 10**2


def test_copying_is_judged_against_changed_pixels_and_against_the_true_mask(first):
    labels, mask = first.clear["labels"], first.clear["mask"]
    names = ("precision", "recall", "f1", "f1_always_clear", "edit_iou")
    # Copied: patches 1 and 2. Unchanged within 16 levels: 1, 2 and 3. Untouched by the mask: 2 and 3.
    assert [labels[name] for name in names] == pytest.approx([1, 2 / 3, 4 / 5, 6 / 7, 1 / 2])
    assert [mask[name] for name in names] == pytest.approx([1 / 2, 1 / 2, 1 / 2, 2 / 3, 1 / 3])


def test_a_patch_is_changed_beyond_the_tolerance():
    labels = evaluate_edits(Prepared(), [FIRST], pixel_tolerance=15).clear["labels"]
    assert labels["clear_true"] == 2 and labels["f1"] == 1


def test_positions_of_all_edits_count_alike(both):
    labels = both.clear["labels"]
    assert (labels["clear_both"], labels["clear_predicted"], labels["clear_true"], labels["positions"]) == (2, 6, 3, 8)
    assert both.clear["mask"]["pictures"] == 1


def test_the_judge_is_asked_about_every_picture_of_its_own_edit(both):
    others = ("raw", "token_composite", "copy_matching_tokens", "input_decoded", "copy_source")
    assert both.done == {"pixel_composite": 0.5} | dict.fromkeys(others, 0.0)
    assert evaluate_edits(Prepared(), [FIRST]).done == {}


def test_log_odds_stand_beside_the_truth_of_their_position(both):
    # At "exact" copying needs 10:1 odds more, and the bias gave half a unit away: neither is the gate's own belief.
    assert both.log_odds == pytest.approx(np.array([-3.0, 2.0, 1.5, -0.5]) - math.log(10) - 0.5)
    assert both.instructed.tolist() == [False, True, True, True]


@pytest.mark.parametrize(("prefer", "cost"), [("edit", math.log(10)), ("balanced", 0.0), ("exact", -math.log(10))])
def test_the_operating_point_is_taken_out_of_the_log_odds(prefer, cost):
    settings = FIRST_RESULT.settings | {"prefer": prefer, "clear_bias": 0.25}
    edit = SimpleNamespace(gate=FIRST_RESULT.gate, settings=settings)
    assert calibrated_log_odds(edit) == pytest.approx(np.array([-3.0, 2.0, 1.5, -0.5]) + cost - 0.25)


def test_joint_guidance_has_no_log_odds_to_speak_of():
    assert np.isnan(calibrated_log_odds(SECOND_RESULT)).all() and len(calibrated_log_odds(SECOND_RESULT)) == 4


def test_scores_compare_the_whole_composite_with_the_target(both):
    squares = 48 * 90**2 + 16 * 10**2 + 16**2
    expected = [10 * math.log10(255**2 / (squares / 256)), 10 * math.log10(255**2 / 100**2)]
    assert both.scores == pytest.approx(expected)


def test_the_page_gets_one_row_an_edit_with_its_own_words(both):
    rows = both.reports
    assert [row["instruction"] for row in rows] == [FIRST.instruction, SECOND.instruction]
    assert [row["note"] for row in rows] == [
        "16.3 dB against the true target, 50% CLEAR, edit done",
        "8.1 dB against the true target, 100% CLEAR, edit not done",
    ]
    painted = rows[0]["mask"]
    assert painted[:8, :8].all() and painted[8:, 8:].all() and painted.sum() == 128
    assert rows[0]["composite"] is FIRST_RESULT.image and rows[0]["target"] is FIRST.target


def test_best_median_and_worst_are_picked_by_score():
    assert best_median_worst(np.array([3.0, math.inf, 9.0, 1.0, 5.0])) == {"Best": 1, "Median": 4, "Worst": 3}
    assert best_median_worst(np.array([7.0])) == {"Best": 0, "Median": 0, "Worst": 0}


def test_the_judge_of_the_built_in_edits_knows_an_edit_from_its_source():
    judge = judge_shapes()
    examples = [sources.read_example(row) for row in sources.shapes(12, size=64, seed=5, split="test")]
    assert all(judge(e.key, e.target) and not judge(e.key, e.source) for e in examples)
    others = [judge(e.key, other.target.resize(e.source.size)) for e, other in zip(examples, examples[1:])]
    assert not any(others)
