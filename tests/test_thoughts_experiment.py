"""The numbers of experiments/thoughts_tiny, on thoughts that are made by hand."""

import numpy as np
import pytest

from experiments.thoughts_tiny.measure import Found, draw_pictures, kept, right_patches, shown
from thinkclearly.data.shapes import PALETTE, Background, Scene, Shape
from thinkclearly.models.finetunes import load_any

GROUND = Background((PALETTE["white"],), name="white")
STAR = Shape("star", "red", "top left", 1 / 6, 1 / 6, 0.145)
DISC = Shape("circle", "blue", "bottom right", 5 / 6, 5 / 6, 0.145)
WANTED, WRONG = Scene(GROUND, (STAR, DISC)), Scene(GROUND, (STAR,))


@pytest.fixture(scope="module")
def tiny():
    return load_any("tiny_chameleon")


def codes_of(tiny, scene) -> list[int]:
    model, processor = tiny
    square = scene.render(processor.image_size)
    return model.token_model.encode(processor.pixel_values([square]))[0].tolist()


def test_a_picture_that_was_never_drawn_is_not_shown(tiny):
    wanted, wrong = codes_of(tiny, WANTED), codes_of(tiny, WRONG)
    assert shown(tiny[0], [wanted, wrong, None], [WANTED] * 3) == [True, False, False]


def test_patches_are_right_where_they_have_the_wanted_colours(tiny):
    grid = tiny[1].grid
    right = right_patches(WRONG.render(64), WANTED, grid).reshape(grid, grid)
    left, top, *_ = (n * grid // 64 for n in DISC.box(64, 64))
    assert right_patches(WANTED.render(64), WANTED, grid).all()
    assert not right[top + 1, left + 1] and right[:top].all() and right[:, :left].all()


def test_what_stays_is_counted_among_what_was_right(tiny):
    """One wrong picture is mended, one right picture is left alone, and one right picture is drawn anew."""
    model, processor = tiny
    wanted, wrong = codes_of(tiny, WANTED), codes_of(tiny, WRONG)
    seen = [right_patches(p, WANTED, processor.grid) for p in draw_pictures(model, [wrong, wanted])]
    n, other = len(wanted), [(code + 1) % model.token_model.codebook_size for code in wanted]
    found = [
        Found(pictures=[wrong, wanted], passes=[9, 3], copied=n // 2),
        Found(pictures=[wanted, wanted], passes=[9, 1], copied=n),
        Found(pictures=[wanted, other], passes=[9, 5]),
        Found(pictures=[wanted], passes=[9]),  # it never drew a second one
    ]
    numbers = kept(model, processor, found, [("", WANTED)] * 4)
    stayed = (np.array(wrong) == wanted) & seen[0]
    assert 0 < stayed.sum() < n
    assert numbers["passes"] == 3 and numbers["right pictures kept whole"] == 1 / 2
    assert numbers["copied by CLEAR"] == pytest.approx((n // 2 + n) / n / 3)
    assert numbers["right patches kept"] == pytest.approx(
        (stayed.sum() + seen[1].sum()) / (seen[0].sum() + 2 * seen[1].sum())
    )
