"""One description of what is withheld serves training's dropout and inference's guidance."""

import pytest

from thinkclearly.decoding.guidance import guidance_weights, guide
from thinkclearly.sequence import (
    FULL,
    NO_SOURCE,
    UNCOND,
    Drawn,
    Dropout,
    Known,
    Seen,
    Words,
    answering,
    drawing,
    named_row,
)

EDIT = drawing("Make it blue.", [0])
TWO = drawing("Put one beside the other.", [3, 4])


def kinds(row):
    return [type(row.sample[i]) for i in sorted(row.withheld)]


def test_an_edit_shows_its_picture_twice_and_draws_one():
    assert EDIT == (Seen(0), Known(0), Words("Make it blue."), Drawn())
    assert drawing("A star.") == (Words("A star."), Drawn())
    assert [segment.picture for segment in TWO[:4]] == [3, 3, 4, 4]


def test_named_rows_withhold_what_their_names_say():
    assert kinds(named_row(EDIT, FULL)) == []
    assert kinds(named_row(TWO, NO_SOURCE)) == [Known, Known]
    assert kinds(named_row(EDIT, UNCOND)) == [Seen, Known, Words]
    assert named_row(EDIT, UNCOND).tells_nothing and not named_row(EDIT, NO_SOURCE).tells_nothing


def test_dropout_makes_the_rows_that_guidance_uses():
    rows = [Dropout(0.2, 0.5, seed=1).row(EDIT, f"record {i}", epoch=0) for i in range(400)]
    named = {name: named_row(EDIT, name) for name in (FULL, NO_SOURCE, UNCOND)}
    assert set(rows) == set(named.values())
    assert 50 < rows.count(named[UNCOND]) < 110 and 110 < rows.count(named[NO_SOURCE]) < 210


def test_dropout_depends_on_seed_epoch_and_record_alone():
    dropout = Dropout(0.3, 0.5, seed=7)
    first = [dropout.row(EDIT, f"record {i}", 2) for i in range(40)]
    assert first == [dropout.row(EDIT, f"record {i}", 2) for i in reversed(range(40))][::-1]
    assert first != [dropout.row(EDIT, f"record {i}", 3) for i in range(40)]
    assert first != [Dropout(0.3, 0.5, seed=8).row(EDIT, f"record {i}", 2) for i in range(40)]


def test_the_codes_of_each_picture_are_withheld_for_themselves():
    rows = {Dropout(0.0, 0.5).row(TWO, str(i), 0).withheld for i in range(100)}
    assert rows == {frozenset(), frozenset({1}), frozenset({3}), frozenset({1, 3})}


def test_questions_are_never_withheld():
    question = answering("What is it?", [0], "A star.")
    assert Dropout(1.0, 1.0).row(question, "k", 0).withheld == frozenset()


def test_guidance_weights_sum_to_one_and_name_only_rows_that_count():
    assert guidance_weights(5.0, 5.0) == pytest.approx({FULL: 5 / 6, NO_SOURCE: 25 / 6, UNCOND: -4.0})
    assert list(guidance_weights(2.0)) == [FULL, UNCOND] and list(guidance_weights(1.0)) == [FULL]
    for weights in (guidance_weights(3.0, 2.0), guidance_weights(1.0, 4.0), guidance_weights(7.5)):
        assert sum(weights.values()) == pytest.approx(1)


def test_guide_goes_by_name_and_not_by_place():
    rows = {UNCOND: 1.0, FULL: 2.0, NO_SOURCE: 4.0}
    assert guide(rows, {NO_SOURCE: 0.5, FULL: 0.75, UNCOND: -0.25}) == 0.5 * 4 + 0.75 * 2 - 0.25
