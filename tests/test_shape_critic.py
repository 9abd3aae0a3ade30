"""What is wrong with a picture of shapes: read from its pixels, said in words, put right."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from thinkclearly.data.shape_critic import badly_drawn, critique_of, mistakes, put_right, read_scene
from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import PALETTE, Background, Scene, Shape
from thinkclearly.data.thoughts import NOTHING_WRONG, critique

WHITE = Background((PALETTE["white"],), name="white")
STAR = Shape("star", "red", "top left", 1 / 6, 1 / 6, 0.145)
CUBE = Shape("square", "blue", "bottom", 0.5, 5 / 6, 0.145)


def names(scene: Scene) -> tuple:
    return scene.background.name, sorted((s.name, s.colour, s.place) for s in scene.shapes)


@pytest.mark.parametrize("size", [64, 192])
def test_what_the_generator_draws_is_read_back(size):
    scenes = [scene for k in range(40) for scene in critique(3, k).scenes]
    read = [names(read_scene(scene.render(size))) == names(scene) for scene in scenes]
    assert np.mean(read) == 1


@pytest.mark.parametrize(
    "shapes, ground, said",
    [
        ((STAR, CUBE), WHITE, []),
        ((CUBE,), WHITE, ["missing"]),
        ((STAR, CUBE, Shape("circle", "green", "right", 5 / 6, 0.5, 0.145)), WHITE, ["extra"]),
        ((Shape("star", "green", "top left", 1 / 6, 1 / 6, 0.145), CUBE), WHITE, ["colour"]),
        ((Shape("circle", "red", "top left", 1 / 6, 1 / 6, 0.145), CUBE), WHITE, ["outline"]),
        ((Shape("star", "red", "center", 0.5, 0.5, 0.145), CUBE), WHITE, ["place"]),
        ((Shape("circle", "green", "top left", 1 / 6, 1 / 6, 0.145), CUBE), WHITE, ["missing", "extra"]),
        ((STAR, CUBE), Background((PALETTE["black"],), name="black"), ["background"]),
    ],
)
def test_each_mistake_is_said_and_put_right(shapes, ground, said):
    found, wanted = Scene(ground, shapes), Scene(WHITE, (STAR, CUBE))
    picture = found.render(64)
    sentences = mistakes(read_scene(picture), wanted, np.random.default_rng(0))
    assert len(sentences) == len(said)
    text = critique_of(picture, read_scene(picture), wanted, np.random.default_rng(0))
    assert (text in NOTHING_WRONG) == (not said)
    for kind, sentence in zip(said, sentences):
        assert {"background": "white", "extra": "green"}.get(kind, "red") in sentence or kind == "colour"
    assert is_shown(put_right(picture, read_scene(picture), wanted), wanted)


def test_what_is_right_stays_as_it_is():
    """Even where it is not where the wanted scene has it to the pixel."""
    moved = Shape("square", "blue", "bottom", 0.51, 0.82, 0.14)
    picture = Scene(WHITE, (moved,)).render(64)
    mended = put_right(picture, read_scene(picture), Scene(WHITE, (STAR, CUBE)))
    left, top, right, bottom = ImageChops.difference(picture, mended).getbbox()
    assert right <= 22 and bottom <= 22
    right_already = put_right(picture, read_scene(picture), Scene(WHITE, (CUBE,)))
    assert right_already.tobytes() == picture.tobytes()


def test_a_shape_that_is_there_and_badly_drawn_is_named_and_drawn_anew():
    wanted = Scene(WHITE, (STAR, CUBE))
    pixels = np.array(wanted.render(64))
    star = (pixels == PALETTE["red"]).all(-1)
    star[::2] = False
    pixels[star] = PALETTE["green"]  # every other row
    picture = Image.fromarray(pixels)
    found = read_scene(picture)
    assert names(found) == names(wanted) and not is_shown(picture, wanted)
    assert badly_drawn(picture, found, wanted) == [STAR]
    text = critique_of(picture, found, wanted, np.random.default_rng(1))
    assert "star" in text and "square" not in text
    assert is_shown(put_right(picture, found, wanted), wanted)


def test_an_empty_picture_has_no_shapes():
    assert read_scene(Image.new("RGB", (64, 64), PALETTE["orange"])).shapes == ()
