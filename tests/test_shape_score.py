"""The graded score is 1 for the scene itself, and less for every single thing that is wrong with a picture of it."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from thinkclearly.data.pairs import shape_pairs
from thinkclearly.data.photographs import PACKAGED_PHOTOS, packaged_photo
from thinkclearly.data.shape_score import is_shown, scene_score
from thinkclearly.data.shapes import PALETTE, SHAPES, Background, Scene, Shape, packaged_photos, random_scene

CIRCLE = Shape("circle", "red", "top left", 1 / 6, 1 / 6, 0.145)
STAR = Shape("star", "blue", "bottom right", 5 / 6, 5 / 6, 0.145)
SQUARE = Shape("square", "orange", "center", 0.5, 0.5, 0.145)


def plain(name, *shapes):
    return Scene(Background((PALETTE[name],), name=name), shapes)


SCENE = plain("yellow", CIRCLE, STAR)


def score(drawn, scene=SCENE, size=(64, 64)):
    return scene_score(drawn.render(*size), scene)


@pytest.mark.parametrize("size", ((64, 64), (96, 64), (40, 120), (384, 384)))
def test_the_scenes_own_picture_scores_one(size):
    random, photos = np.random.default_rng(0), packaged_photos("train")
    scenes = [SCENE, plain("white"), *(random_scene(random, photos) for _ in range(12 if size == (384, 384) else 60))]
    assert [score(scene, scene, size) for scene in scenes] == [1.0] * len(scenes)


WRONG = {
    "colour": plain("yellow", replace(CIRCLE, colour="green"), STAR),
    "shape": plain("yellow", replace(CIRCLE, name="triangle"), STAR),
    "place": plain("yellow", replace(CIRCLE, x=5 / 6), STAR),
    "missing": plain("yellow", STAR),
    "one too many": plain("yellow", CIRCLE, STAR, SQUARE),
    "background": plain("purple", CIRCLE, STAR),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_single_wrong_thing_costs_and_leaves_the_rest(wrong):
    assert 0.5 < score(WRONG[wrong]) < 0.95


def test_what_is_nearer_to_the_scene_scores_higher():
    found = {name: score(drawn) for name, drawn in WRONG.items()}
    assert found["missing"] < found["place"] < found["shape"] < 1
    assert found["missing"] < found["colour"] < 1
    two_wrong = plain("yellow", replace(CIRCLE, colour="green", name="triangle"), STAR)
    assert score(two_wrong) < min(found["colour"], found["shape"])
    everything = plain("purple", replace(CIRCLE, x=0.5, colour="green"), replace(STAR, x=0.5, name="circle"))
    assert score(everything) < score(plain("yellow")) < min(found.values())


@pytest.mark.parametrize("kept", (0.25, 0.5, 0.75))
def test_a_faint_change_moves_the_score_by_degrees(kept):
    """A shape that is drawn in part scores between the missing and the whole one."""
    whole, missing = (np.asarray(scene.render(64)) for scene in (SCENE, WRONG["missing"]))
    part = missing.copy()
    rows = round(kept * 22)
    part[:rows, :22] = whole[:rows, :22]
    assert score(WRONG["missing"]) < scene_score(Image.fromarray(part), SCENE) < 1


@pytest.mark.parametrize("ground", PALETTE)
def test_a_plain_picture_gets_the_background_at_most(ground):
    shapes = [replace(shape, colour="white" if ground == "red" else "red") for shape in (CIRCLE, STAR)]
    scene = plain(ground, *shapes)
    assert scene_score(Image.new("RGB", (64, 64), (128, 128, 128)), scene) == 0
    assert scene_score(Image.new("RGB", (64, 64), PALETTE[ground]), scene) == 0.25
    assert scene_score(Image.new("RGB", (64, 64), PALETTE[shapes[0].colour]), scene) < 0.05


def test_noise_is_worth_less_than_any_scene_with_one_mistake():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert scene_score(noise, SCENE) < 0.35 < min(map(score, WRONG.values()))


def test_the_score_bears_a_blur():
    assert scene_score(SCENE.render(64).filter(ImageFilter.GaussianBlur(1)), SCENE) > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_every_outline_is_told_from_every_other(shape):
    scene = plain("black", replace(SQUARE, name=shape))
    scores = {other: score(plain("black", replace(SQUARE, name=other)), scene) for other in SHAPES}
    assert scores.pop(shape) == 1
    assert max(scores.values()) <= 0.76  # all of the outline's quarter but what coarse pixels leave


def test_where_the_background_has_no_name_only_the_shapes_count():
    over_photo = Scene(Background(photo=packaged_photo(*PACKAGED_PHOTOS["test"][0])), (CIRCLE, STAR))
    assert score(SCENE, over_photo) > 0.95
    assert score(replace(over_photo, shapes=(STAR,)), over_photo) < 0.7


def test_a_shape_in_an_empty_scene_is_one_too_many():
    nothing = plain("white")
    assert score(plain("white", CIRCLE), nothing) < 0.7
    assert is_shown(nothing.render(64), nothing)
    assert not is_shown(plain("white", CIRCLE).render(64), nothing)


def test_a_scene_is_shown_if_nothing_is_wrong():
    assert is_shown(SCENE.render(64), SCENE)
    assert not [name for name, drawn in WRONG.items() if is_shown(drawn.render(64), SCENE)]


def test_a_scene_is_never_taken_for_its_partner_in_a_pair():
    for pair in shape_pairs(60):
        scenes = [Scene.from_json(text) for text in pair["scene"]]
        shown = [[is_shown(drawn.render(64), wanted) for drawn in scenes] for wanted in scenes]
        assert shown == [[True, False], [False, True]], pair["key"]
        scores = [[score(drawn, wanted) for drawn in scenes] for wanted in scenes]
        assert scores[0][0] == scores[1][1] == 1 and max(scores[0][1], scores[1][0]) < 0.95, pair["key"]
