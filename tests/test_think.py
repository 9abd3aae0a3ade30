"""A thought as it comes, and whole: from a model of one stream, and from one that draws, is asked and edits."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import GOLDEN_ROOT
from PIL import Image
from safetensors.torch import load_file

import thinkclearly
from thinkclearly.data.thought_files import detokenize
from thinkclearly.decoding.interleaved import Ended
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.editing import think as by_turns
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.think import NOTHING, think
from thinkclearly.generation.think import CHANGED, Picture, Text, Thought, whole
from thinkclearly.images import patch_difference
from thinkclearly.models.finetunes import TINY_CLEAR
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.load import load_checkpoint

ROOT = GOLDEN_ROOT / "chameleon_tiny"
LONG = 480
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]
PROMPT = "A red circle on a blue background."
MODES = {"image_critique": "critique", "object_thoughts": "subgoals", "general": "general"}


@pytest.fixture(scope="module")
def chameleon():
    return thinkclearly.load_model(str(ROOT / "checkpoint"))


@pytest.fixture(scope="module")
def janus():
    return thinkclearly.load_editor(str(TINY_CLEAR))


@pytest.fixture(scope="module")
def runs():
    return json.loads((ROOT / "expected.json").read_text(encoding="utf-8"))["runs"]


def same(a, b):
    """Whether two thoughts are one: words, codes, pixels and masks."""
    assert [type(part) for part in a.parts] == [type(part) for part in b.parts]
    for x, y in zip(a.parts, b.parts):
        if isinstance(x, Text):
            assert x == y
        else:
            assert x.codes == y.codes and x.image.tobytes() == y.image.tobytes()
            assert np.array_equal(x.changed, y.changed) and np.array_equal(x.clear, y.clear)


# ---- one stream --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["critique", "critique_short", "object", "general", "general_image", "general_full"])
def test_a_greedy_thought_is_the_originals_in_words_and_pictures(chameleon, runs, name):
    run, expected = runs[name], load_file(ROOT / "expected.safetensors")
    settings = {"mode": MODES[run["mode"]], "preset": "code", "second": "draw", "max_length": run["max_length"]}
    if run["mode"] == "general":
        settings["guidance_kind"] = run["cfg_type"]
    images = [ROOT / file for file in run.get("images", [])]
    options = {"temperature": 0.0, "picture_temperature": 0.0} | settings
    thought = Thought(list(chameleon.think(run["prompt"], images=images, **options)))
    told = run["prompt_ids"][: run["prompt_ids"].index(chameleon.processor.sep_id)]
    answer = run["text"].removeprefix(detokenize(chameleon.processor, told)[0])
    assert thought.text == re.sub(r"<image_\d>", "", answer) and len(thought.pictures) == run["num_images"]
    for k, picture in enumerate(thought.pictures, start=len(images)):
        if (key := f"run.{name}.image_{k}") in expected:
            assert np.abs(np.asarray(picture.image).astype(int) - expected[key].numpy()).max() <= 1


def test_words_and_pictures_come_one_by_one_and_the_end_last(chameleon):
    settings = ThoughtSettings(max_length=LONG)
    parts = [part for _, part in think(chameleon, [PROMPT], settings, samples=[(3, 0)])]
    assert isinstance(parts[0], Picture) and isinstance(parts[-1], Ended)
    assert parts[-1].ids[-1] == chameleon.processor.eoi_id or parts[-1].reason != "max_pictures"
    stream = chameleon.think(PROMPT, max_length=LONG, seed=3)
    first = next(stream)
    assert first.codes == parts[0].codes and first.changed is None and first.clear is None and first.passes > 0
    thought, again = Thought([first, *stream]), Thought(parts[:-1])
    same(thought, again)
    assert thought.first is thought.pictures[0].image and thought.last is thought.pictures[-1].image


def test_a_thought_does_not_depend_on_what_is_thought_beside_it(chameleon):
    settings = ThoughtSettings(mode="subgoals", max_length=LONG)
    prompts, samples = [PROMPT, "A kite.", "A boat."], [(5, 4), (5, 7), (6, 7)]
    together = dict(whole(think(chameleon, prompts, settings, samples=samples)))
    assert sorted(together) == [0, 1, 2]
    for number, prompt in enumerate(prompts):
        ((_, alone),) = whole(think(chameleon, [prompt], settings, samples=[samples[number]]))
        same(together[number], alone)
        assert together[number].ids == alone.ids and together[number].ended == alone.ended


def test_what_changed_is_told_by_pixels(chameleon, runs):
    options = {"preset": "code", "second": "draw", "temperature": 0.0, "picture_temperature": 0.0}
    thought = Thought(list(chameleon.think(runs["critique"]["prompt"], max_pictures=2, **options)))
    before, after = thought.pictures
    grid = chameleon.processor.grid
    assert np.array_equal(after.changed, patch_difference(before.image, after.image, grid) > CHANGED)


def test_what_the_head_copies_is_the_picture_before_byte_for_byte(runs):
    checkpoint = load_checkpoint(str(ROOT / "checkpoint"))
    config = ClearConfig(checkpoint.token_model.codebook_size, instructions=["CLEAR"])
    model = InstructionModel(checkpoint.network, config)
    with torch.no_grad():  # some patches are copied, some are not
        model.clear_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.clear_head.bias.fill_(5.0)
    options = {"preset": "code", "temperature": 0.0, "picture_temperature": 0.0, "max_pictures": 2}
    thought = Thought(list(Editor(model, checkpoint.processor).think(runs["critique"]["prompt"], **options)))
    before, after = thought.pictures
    assert before.clear is None and 0 < after.clear.mean() < 1
    clear = after.clear.flatten()
    assert np.array_equal(np.array(after.codes)[clear], np.array(before.codes)[clear])
    patch = before.image.width // checkpoint.processor.grid
    pixels = after.clear.repeat(patch, 0).repeat(patch, 1)
    assert np.array_equal(np.asarray(before.image)[pixels], np.asarray(after.image)[pixels])
    assert not (after.changed & after.clear).any()


def test_a_thought_without_a_picture_has_no_last_one():
    thought = Thought([Text("Nothing.", [])])
    assert thought.text == "Nothing."
    with pytest.raises(ValueError, match="no picture"):
        _ = thought.last


def test_pictures_before_the_words_need_no_mark(chameleon):
    image = Image.open(ROOT / "images" / "square.png")
    options = {"mode": "general", "max_length": LONG, "max_pictures": 1}
    marked = Thought(list(chameleon.think("<image>At night.", images=[image], **options)))
    same(Thought(list(chameleon.think("At night.", images=[image], **options))), marked)


# ---- draw, ask, edit ---------------------------------------------------------------------------------------------


def test_a_model_without_a_stream_draws_is_asked_and_edits(janus):
    parts = list(janus.think(PROMPT, seed=2))
    first, words, last = parts
    assert isinstance(words, Text) and words.text
    (drawn,) = janus.generate(PROMPT, seed=2)
    assert patch_difference(first.image, drawn, 1).max() <= 1 and first.changed is None
    grid = janus.processor.grid
    patches = last.clear.repeat(drawn.height // grid, 0).repeat(drawn.width // grid, 1)
    a, b = np.asarray(first.image), np.asarray(last.image)
    assert 0 < last.clear.mean() < 1 and np.array_equal(a[patches], b[patches])
    assert not (last.changed & last.clear).any()


def test_several_thoughts_by_turns_are_those_of_one(janus):
    settings, prompts = ThoughtSettings(), [PROMPT, "A green square on a white background."]
    together = dict(whole(think(janus, prompts, settings, samples=[(0, 4), (1, 9)])))
    ((_, alone),) = whole(think(janus, prompts[1:], settings, samples=[(1, 9)]))
    assert [part.codes for part in together[1].pictures] == [part.codes for part in alone.pictures]
    assert together[1].text == alone.text and together[1].ended == "edited"


def test_what_is_right_is_not_edited(janus, monkeypatch):
    monkeypatch.setattr(by_turns, "describe", lambda *_, **__: ["Nothing."])
    ((_, thought),) = whole(think(janus, [PROMPT], ThoughtSettings(), samples=[(0, 0)]))
    assert thought.first is thought.last and thought.text == "Nothing." and thought.ended == "satisfied"
    assert all(NOTHING.fullmatch(answer) for answer in ("", "nothing", "'Nothing.'", "None.", "No change."))
    assert not any(NOTHING.fullmatch(answer) for answer in ("Nothing is red; make it so.", "Make the cup blue."))


def test_one_picture_is_not_asked_about(janus):
    ((_, thought),) = whole(think(janus, [PROMPT], ThoughtSettings(max_pictures=1), samples=[(0, 0)]))
    assert len(thought.parts) == 1 and thought.ended == "max_pictures"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mode": "subgoals"}, "mode='subgoals'"),
        ({"second": "draw"}, "second='draw'"),
        ({"full_scale": 2.0, "prompt_scale": 1.0}, "full_scale=2.0, prompt_scale=1.0"),
    ],
)
def test_what_only_a_stream_can_do_is_refused_by_name(janus, overrides, message):
    with pytest.raises(ValueError, match=f"{message}: only a model of words and pictures in one stream"):
        list(janus.think(PROMPT, **overrides))


def test_what_cannot_be_thought_about_is_refused(janus, chameleon):
    with pytest.raises(ValueError, match="thinks about words alone"):
        list(janus.think(PROMPT, images=[Image.new("RGB", (32, 32))]))
    for model in (janus, chameleon):
        with pytest.raises(ValueError, match="empty"):
            list(model.think("  "))
    with pytest.raises(ValueError, match="2 marks <image> and comes with 1 pictures"):
        list(chameleon.think("<image><image>", images=[Image.new("RGB", (32, 32))], mode="general"))
    with pytest.raises(ValueError, match="seed=-1"):
        chameleon.think(PROMPT, seed=-1)
