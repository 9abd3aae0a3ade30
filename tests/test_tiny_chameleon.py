"""The tiny Chameleon that ships along: how large it is, that it draws what it is told, and that it sees mistakes."""

import numpy as np
import pytest

from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import Scene
from thinkclearly.data.sources import OFFSETS
from thinkclearly.data.thoughts import NOTHING_WRONG, critique, thought_rows
from thinkclearly.decoding.interleaved import Context, Said, context, interleave
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.generation.think import think, whole
from thinkclearly.images import patch_difference
from thinkclearly.models.finetunes import load_any
from thinkclearly.models.folder import BY_NAME

FOLDER = BY_NAME["tiny_chameleon"]
GREEDY = {"guidance_kind": "normal", "full_scale": 1.0, "pictures_scale": 0.0, "temperature": 0.0}
GREEDY |= {"picture_temperature": 0.0, "second": "draw"}


@pytest.fixture(scope="module")
def tiny():
    return load_any("tiny_chameleon")


def test_it_is_small(tiny):
    assert sum(parameter.numel() for parameter in tiny[0].network.parameters()) <= 12e6
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16e6


def test_it_draws_most_held_out_prompts_right_at_once(tiny):
    rows = thought_rows("general", 10, "test", seed=5)
    stream = think(
        *tiny, rows["prompt"], ThoughtSettings(mode="general", **GREEDY), samples=[(0, i) for i in range(10)]
    )
    drawn = {number: thought.last for number, thought in whole(stream)}
    right = [is_shown(drawn[i], Scene.from_json(row["scene"])) for i, row in enumerate(rows)]
    assert sum(right) >= 7


def test_its_words_find_mistakes_and_praise_what_is_right(tiny):
    model, processor = tiny
    for wrong, at_least in ((1.0, 6), (0.0, 6)):
        settings, contexts = ThoughtSettings(**GREEDY, max_pictures=1), []
        for number in range(10):
            thought = critique(5, OFFSETS["test"] + number, wrong)
            codes = model.token_model.encode(processor.pixel_values([thought.scenes[0].render(64)]))[0].tolist()
            start = context(processor, thought.prompt, settings)
            contexts.append(Context([*start.ids, *processor.picture_ids(codes)[1:]], start.prompt_ids))
        said = {}
        for number, part in interleave(model, processor, contexts, settings, [(0, i) for i in range(10)]):
            if isinstance(part, Said):
                said.setdefault(number, processor.decode_words(part.ids))
        praised = [words in NOTHING_WRONG for words in said.values()]
        assert len(said) == 10 and praised.count(wrong == 0.0) >= at_least


def test_a_patch_that_does_not_change_keeps_its_code(tiny):
    model, processor = tiny
    for number in range(10):
        pictures = [scene.render(64) for scene in critique(5, number, wrong=1.0).scenes]
        before, after = model.token_model.encode(processor.pixel_values(pictures)).numpy()
        stays = patch_difference(*pictures, processor.grid).ravel() == 0
        assert np.mean((before == after)[stays]) > 0.97
