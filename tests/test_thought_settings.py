"""Guidance of a thought's pictures: the original's formulas as weights by row name; options that are checked."""

import pytest

from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.sequence import FULL, UNCOND


def formula(kind, rows, a, b, c, d):
    f, u, p, n, o = (rows[name] for name in (FULL, UNCOND, "pictures", "negative", "prompt"))
    if kind == "normal":
        return u + a * (f - u) + b * (p - u)
    if kind == "obj":
        return u + a * (f - u) - c * (n - u)
    return u + a * (f - p) + b * (p - u) - c * (n - u) + d * (o - u)


@pytest.mark.parametrize("kind", ["normal", "obj", "full"])
def test_weights_are_the_originals_formula_and_sum_to_one(kind):
    scales = 2.5, 1.25, 3.0, 0.75
    names = ("full_scale", "pictures_scale", "negative_scale", "prompt_scale")
    weights = ThoughtSettings(guidance_kind=kind, **dict(zip(names, scales))).weights(0)
    rows = {FULL: 3.0, UNCOND: -1.0, "pictures": 7.0, "negative": 0.5, "prompt": 11.0}
    assert sum(weights.values()) == pytest.approx(1)
    assert sum(weight * rows[name] for name, weight in weights.items()) == pytest.approx(formula(kind, rows, *scales))


def test_sub_goals_are_guided_as_objects_first_and_by_all_rows_from_the_third_picture_on():
    settings = ThoughtSettings(mode="subgoals", preset="paper")
    assert [set(settings.weights(k)) for k in (0, 1)] == [{FULL, UNCOND, "negative"}] * 2
    assert set(settings.weights(2)) == {FULL, UNCOND, "negative", "pictures", "prompt"}


def test_rows_without_weight_are_left_out_but_never_the_full_row():
    assert "negative" not in ThoughtSettings(preset="code").weights(0)
    assert ThoughtSettings(guidance_kind="normal", full_scale=0.0).weights(0)[FULL] == 0.0
    assert ThoughtSettings(guidance_kind="normal", full_scale=1.0, pictures_scale=0.0).weights(0) == {FULL: 1.0}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mode": "dream"}, "mode='dream'"),
        ({"preset": "mine"}, "preset='mine'"),
        ({"guidance_kind": "joint"}, "guidance_kind='joint'"),
        ({"full_scale": float("nan")}, "full_scale=nan; expected a finite number"),
        ({"max_pictures": 0}, "max_pictures=0; expected 1 or more"),
        ({"picture_temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"second": "copy"}, "second='copy'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        ThoughtSettings(**wrong)
