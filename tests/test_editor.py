"""Edits are repeatable, do not depend on what they are decoded with, and leave what is CLEAR to the byte."""

import io
import json
import math
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import icc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from janus_reference import between, t2i_keys, t2i_text
from PIL import Image
from sklearn.datasets import load_sample_image

from thinkclearly.colour import seen
from thinkclearly.decoding import cache
from thinkclearly.decoding.engine import Decoded
from thinkclearly.editing.batch import edit_items
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.session import EditSession
from thinkclearly.editing.settings import EditSettings
from thinkclearly.images import Letterbox, load_image, load_photo
from thinkclearly.models.finetunes import load_base, load_clear_model

pytestmark = pytest.mark.golden
INSTRUCTIONS = ["Make the red circle blue.", "Night.", "Remove the green square from the table and nothing else."]


@pytest.fixture(scope="module")
def editor(golden):
    model, processor = load_clear_model(golden / "finetune", base=golden / "checkpoint")
    return Editor(model, processor)


@pytest.fixture(scope="module")
def base_editor(golden):
    return Editor(*load_base(golden / "checkpoint"))


@pytest.fixture(scope="module")
def pictures(golden):
    """As many as there are instructions, squares first."""
    found = sorted((golden / "images").glob("*.png"), key=lambda path: np.ptp(Image.open(path).size))
    return found[: len(INSTRUCTIONS)]


@pytest.fixture(scope="module")
def bias(editor, pictures):
    """Puts the gate's zero among its values: the tiny model copies some patches and paints others."""
    return -between(editor.edit(pictures[0], INSTRUCTIONS[0], temperature=0).gate)


def clear_pixels(result):
    return result.letterbox.unfit_grid(result.clear)


def largest_difference(a, b):
    """Equal tokens decode alike up to the last bit, which depends on the batch; bytes are rounded and resized."""
    return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()


def test_several_samples_differ_and_each_is_its_own(editor, pictures, bias, sizes):
    options = {"seed": 3, "clear_bias": bias}
    three = editor.edit(pictures[1], INSTRUCTIONS[0], num_images=3, **options)
    five = editor.edit(pictures[1], INSTRUCTIONS[0], num_images=5, **options)
    assert len(three) == 3 and len(five) == 5
    assert len({tuple(result.class_ids.tolist()) for result in five}) == 5
    for k, result in enumerate(three):
        assert result.sample == k and result.seed == 3
        assert torch.equal(result.class_ids, five[k].class_ids)
        assert torch.equal(result.fed_codes, five[k].fed_codes)
        assert largest_difference(result.image, five[k].image) <= 2
        assert result.fed_codes.max() < sizes.codes, "no instruction goes back into the model"
    alone = editor.edit(pictures[1], INSTRUCTIONS[0], **options)
    assert torch.equal(alone.class_ids, three[0].class_ids)
    other = editor.edit(pictures[1], INSTRUCTIONS[0], **options | {"seed": 4})
    assert not torch.equal(other.class_ids, alone.class_ids)
    # Noise that is not noise (NaN, a constant) would repeat one code.
    assert len(set(alone.codes.tolist())) > sizes.positions // 4


@pytest.mark.parametrize("guidance", ["factorised", "joint"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_the_same_tokens_as_one_by_one(editor, pictures, bias, guidance, temperature):
    options = {"temperature": temperature, "guidance": guidance, "clear_bias": bias, "seed": 1}
    together = editor.edit_many(pictures, INSTRUCTIONS, **options)
    for picture, instruction, result in zip(pictures, INSTRUCTIONS, together, strict=True):
        alone = editor.edit(picture, instruction, **options)
        assert torch.equal(result.class_ids, alone.class_ids)
        assert torch.equal(result.fed_codes, alone.fed_codes)
        assert torch.equal(result.codes, alone.codes)
        torch.testing.assert_close(result.gate, alone.gate, atol=1e-4, rtol=1e-4)
        assert largest_difference(result.image, alone.image) <= 2
        assert result.instruction == instruction
        assert result.image.size == Image.open(picture).size


def test_settings_change_what_they_say(editor, pictures, bias, sizes):
    options = {"temperature": 0.0, "clear_bias": bias, "cfg_weight": 3.0}
    guided = editor.edit(pictures[0], INSTRUCTIONS[0], **options)
    free = editor.edit(pictures[0], INSTRUCTIONS[0], **options, use_cfg=False)
    full_row = editor.edit(pictures[0], INSTRUCTIONS[0], **options | {"cfg_weight": 1.0, "cfg_weight2": 0.0})
    assert torch.equal(free.class_ids, full_row.class_ids), "weight 1 on the full row is no guidance"
    assert not torch.equal(guided.codes, free.codes)
    nothing = editor.edit(pictures[0], INSTRUCTIONS[0], temperature=0.0, clear_bias=-1e4)
    assert nothing.clear_fraction == 0 and torch.equal(nothing.codes, nothing.fed_codes)
    everything = editor.edit(pictures[0], INSTRUCTIONS[0], temperature=0.0, clear_bias=1e4)
    assert everything.clear_fraction == 1 and torch.equal(everything.fed_codes, everything.source_tokens)
    assert np.array_equal(everything.image, everything.source)
    assert not np.array_equal(everything.raw, everything.token_composite), "raw is without CLEAR"
    joint = editor.edit(pictures[0], INSTRUCTIONS[0], temperature=1.0, clear_bias=bias, guidance="joint", top_k=3)
    painted = joint.class_ids < sizes.codes
    assert torch.equal(joint.codes[painted], joint.fed_codes[painted])


def test_the_gate_decides_in_factorised_mode(editor, pictures, bias, sizes):
    result = editor.edit(pictures[0], INSTRUCTIONS[0], clear_bias=bias)
    copied = result.class_ids >= sizes.codes
    assert 0 < copied.float().mean() < 1
    assert torch.equal(copied, result.gate > 0)
    assert torch.equal(result.fed_codes, torch.where(copied, result.source_tokens, result.class_ids))
    assert result.clear_fraction == pytest.approx(copied.float().mean().item())
    hot = editor.edit(pictures[0], INSTRUCTIONS[0], clear_bias=bias, temperature=0)
    assert (hot.gate[0] - result.gate[0]).abs() < 1e-5, "sampling has no part in the first decision"


def test_a_large_photograph_keeps_its_size_and_its_clear_pixels(editor, bias):
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((3000, 2000), Image.Resampling.BICUBIC)
    result = editor.edit(photo, INSTRUCTIONS[0], clear_bias=bias, temperature=0)
    for picture in (result.image, result.raw, result.token_composite, result.input_decoded, result.mask):
        assert picture.size == (3000, 2000)
    pixels, found, source = clear_pixels(result), np.asarray(result.image), np.asarray(photo)
    assert 0 < pixels.mean() < 1
    assert np.array_equal(found[pixels], source[pixels])
    assert np.array_equal(np.asarray(result.mask) > 127, pixels)
    assert (found[~pixels] != source[~pixels]).any()


def test_smoothing_changes_composite_and_mask_but_not_the_gate_s(editor, pictures, bias):
    plain = editor.edit(pictures[0], INSTRUCTIONS[0], clear_bias=bias)
    smooth = editor.edit(pictures[0], INSTRUCTIONS[0], clear_bias=bias, mask_smooth_ksize=3, feather_radius_px=0)
    assert torch.equal(plain.class_ids, smooth.class_ids)
    assert np.array_equal(plain.gate_mask, smooth.gate_mask) and np.array_equal(plain.mask, plain.gate_mask)
    assert not np.array_equal(plain.mask, smooth.mask)
    expected = np.where(clear_pixels(smooth)[..., None], smooth.source, smooth.token_composite)
    assert np.array_equal(smooth.image, expected)


MODES = {"RGB": 3, "RGBA": 4}


@given(
    size=st.tuples(st.integers(8, 150), st.integers(8, 150)),
    mode=st.sampled_from(["RGB", "RGBA"]),
    profile=st.sampled_from([None, icc.display_p3()]),
    share=st.sampled_from([0.0, 0.2, 0.6, 0.9, 1.0]),
    asked=st.fixed_dictionaries(
        {
            "mask_smooth_ksize": st.sampled_from([1, 3, 5]),
            "mask_smooth_passes": st.integers(0, 2),
            "feather_radius_px": st.sampled_from([0.0, 0.5, 2.0, 8.0, 40.0]),
            "feather": st.sampled_from(["inside", "two_sided"]),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_pixel_that_the_mask_calls_clear_is_the_source_s(editor, size, mode, profile, share, asked, seed):
    """Over all settings of cleaning, smoothing and blending, from decoded classes on."""
    rng, n = np.random.default_rng(seed), editor.processor.num_image_tokens
    width, height = size
    picture = Image.fromarray(rng.integers(0, 256, (height, width, MODES[mode]), np.uint8))
    picture.info = {"icc_profile": profile}
    source, box = load_photo(picture), Letterbox(width, height, editor.processor.image_size)
    codes = torch.from_numpy(rng.integers(0, editor.model.clear_config.codebook_size, n))
    ids = torch.where(torch.from_numpy(rng.random(n) < share), editor.model.clear_config.codebook_size, codes)
    decoded = Decoded(ids[None], codes[None], codes[None], torch.zeros(1, n), 1, [[n]])
    drawn = Image.fromarray(rng.integers(0, 256, (box.size, box.size, 3), np.uint8))
    original = editor._original(source, box, codes)
    result = editor._result(0, 0, decoded, codes, drawn, None, original, EditSettings(**asked))
    clear, before, after = np.asarray(result.mask) > 127, np.asarray(picture), np.asarray(result.image)
    assert np.array_equal(after[clear], before[clear]) and result.clear_fraction == clear.mean()
    assert result.image.mode == mode and result.image.info.get("icc_profile") == profile
    assert np.array_equal(
        np.asarray(result.gate_mask) > 127,
        box.unfit_grid(ids.view(result.clear.shape) != codes.view(result.clear.shape)),
    )
    if asked["feather"] == "inside":
        assert np.array_equal(clear, box.unfit_grid(result.clear))


def p3_photo(picture, mode="RGB", **options):
    """The picture in a Display-P3 file, its colours as strong as the screen allows."""
    buffer = io.BytesIO()
    load_image(picture).convert(mode).save(buffer, "PNG", icc_profile=icc.display_p3(), dpi=(300, 300), **options)
    return buffer.getvalue()


def test_a_display_p3_photo_keeps_its_colours_and_the_model_sees_srgb(editor, pictures, bias, tmp_path):
    data = p3_photo(pictures[0])
    result = editor.edit(data, INSTRUCTIONS[0], clear_bias=bias, feather_radius_px=0)
    as_seen = editor.edit(load_image(data), INSTRUCTIONS[0], clear_bias=bias, feather_radius_px=0)
    assert torch.equal(result.class_ids, as_seen.class_ids) and torch.equal(
        result.source_tokens, as_seen.source_tokens
    )
    plain = editor.edit(pictures[0], INSTRUCTIONS[0], clear_bias=bias)
    assert not torch.equal(plain.source_tokens, as_seen.source_tokens), "other colours"
    stored, clear = np.asarray(Image.open(io.BytesIO(data))), np.asarray(result.mask) > 127
    assert 0 < clear.mean() < 1 and np.array_equal(np.asarray(result.image)[clear], stored[clear])
    # What was painted looks like what the model drew, though the numbers are others.
    drawn, image, looks = (
        np.asarray(p, int)[~clear] for p in (result.token_composite, result.image, seen(result.image))
    )
    assert np.abs(looks - drawn).mean() < 0.5 and np.abs(image - drawn).mean() > 3
    for name in ("edited.png", "edited.jpg", "edited.webp", "edited.tiff"):
        result.image.save(tmp_path / name)
        assert Image.open(tmp_path / name).info["icc_profile"] == icc.display_p3()
    result.save(tmp_path)
    for name in ("input_image.png", "pixel_composite.png", "copy_matching_tokens.png"):
        info = Image.open(tmp_path / name).info
        assert info["icc_profile"] == icc.display_p3() and np.allclose(info["dpi"], 300, atol=0.1)
    assert "icc_profile" not in Image.open(tmp_path / "raw_model.png").info


def test_transparency_is_the_source_s_everywhere_and_hidden_paint_is_said(editor, pictures, bias):
    glass = load_image(pictures[0]).convert("RGBA")
    alpha = np.tile(np.linspace(0, 255, glass.width).astype(np.uint8), (glass.height, 1))
    glass.putalpha(Image.fromarray(alpha))
    result = editor.edit(glass, INSTRUCTIONS[0], clear_bias=bias, use_cfg=False)
    assert np.array_equal(result.image.getchannel("A"), alpha)
    clear = np.asarray(result.mask) > 127
    assert np.array_equal(np.asarray(result.image)[clear], np.asarray(glass)[clear]), "hidden colours too"
    as_seen = editor.edit(load_image(glass), INSTRUCTIONS[0], clear_bias=bias, use_cfg=False)
    assert torch.equal(result.class_ids, as_seen.class_ids)
    nothing = editor.edit(glass, INSTRUCTIONS[0], clear_bias=1e4, use_cfg=False)
    assert np.array_equal(nothing.image, glass) and nothing.notes == ()
    everything = editor.edit(glass, INSTRUCTIONS[0], clear_bias=-1e4, use_cfg=False)
    assert everything.notes[0].endswith("fully transparent in the source and stay so; lay it on a background.")


def test_a_picture_of_16_bits_says_that_it_comes_back_in_8(editor, caplog, tmp_path):
    deep = Image.fromarray(np.full((20, 30), 0x8080, np.uint16))
    results = [editor.edit(deep, "Night.", clear_bias=1e4) for _ in range(2)]
    results[0].save(tmp_path)
    notes = json.loads((tmp_path / "result.json").read_text())["notes"]
    assert notes == list(results[1].notes) and "edited and saved in 8 bits" in notes[0]
    assert caplog.text.count("edited and saved in 8 bits") == 1


def test_a_base_without_head_edits_but_never_copies(base_editor, pictures, sizes, tmp_path):
    result = base_editor.edit(pictures[1], INSTRUCTIONS[0], num_images=2, clear_bias=1e4)[1]
    assert result.clear_fraction == 0 and result.class_ids.max() < sizes.codes
    assert torch.equal(result.class_ids, result.fed_codes) and torch.equal(result.class_ids, result.codes)
    assert result.gate.isnan().all()
    assert np.array_equal(result.image, result.token_composite)
    result.save(tmp_path, trace=True)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "token_trace.jsonl")]
    assert {line["gate"] for line in lines} == {None}


def test_raw_and_decoded_source_are_drawn_when_asked_for(editor, pictures, bias):
    results = editor.edit_many(pictures[:2], INSTRUCTIONS[:2], num_images=2, clear_bias=bias)
    assert not {"raw", "input_decoded"} & set(vars(results[0]))
    alone = editor.edit(pictures[1], INSTRUCTIONS[1], clear_bias=bias)
    assert largest_difference(results[2].raw, alone.raw) <= 2
    for k in (2, 3):
        assert largest_difference(results[k].input_decoded, alone.input_decoded) <= 2
    assert results[2].raw is results[2].raw
    assert results[2].further is None and results[3].further is not None, "the model may go once all is drawn"
    copied = pickle.loads(pickle.dumps(results[3]))
    assert copied.further is None and np.array_equal(copied.raw, results[3].raw)


def test_saved_files_hold_the_result(editor, pictures, bias, sizes, tmp_path):
    result = editor.edit(pictures[1], INSTRUCTIONS[0], clear_bias=bias, seed=11)
    names = {f"{name}.png" for name in ("input_image", "input_decoded", "raw_model", "token_composite")}
    names |= {"pixel_composite.png", "clear_mask.png", "gate_mask.png", "copy_matching_tokens.png", "result.json"}
    result.save(tmp_path / "a" / "b")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == names
    result.save(tmp_path / "c", trace=True)
    assert {path.name for path in (tmp_path / "c").iterdir()} == names | {"token_trace.jsonl"}
    assert np.array_equal(Image.open(tmp_path / "c" / "pixel_composite.png"), result.image)
    assert np.array_equal(Image.open(tmp_path / "c" / "input_image.png"), result.source)
    content = json.loads((tmp_path / "c" / "result.json").read_text())
    assert content["instruction"] == INSTRUCTIONS[0] and content["seed"] == 11
    assert content["size"] == [*result.source.size] and content["class_ids"] == result.class_ids.tolist()
    assert EditSettings(**content["settings"]).clear_bias == bias
    trace = [json.loads(line) for line in (tmp_path / "c" / "token_trace.jsonl").read_text().splitlines()]
    assert [line["position"] for line in trace] == list(range(sizes.positions))
    assert [line["class_id"] for line in trace] == result.class_ids.tolist()
    line = trace[sizes.grid + 1]
    assert line["row"] == 1 and line["column"] == 1
    assert line["gate"] == pytest.approx(result.gate[sizes.grid + 1].item())


def test_progress_is_told_after_every_pass(editor, pictures, sizes):
    calls = []
    for options in ({"block": 1}, {"block": 5}, {}):
        calls.clear()
        result = editor.edit(pictures[0], INSTRUCTIONS[0], progress=lambda *call: calls.append(call), **options)
        done = [call[0] for call in calls]
        assert len(calls) == result.passes and done == sorted(set(done)) and calls[-1] == (sizes.positions,) * 2
    calls.clear()
    editor.generate("a red circle", progress=lambda *call: calls.append(call), block=1)
    assert calls == [(done, sizes.positions) for done in range(1, sizes.positions + 1)]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"instruction": "  "}, ValueError, "empty instruction"),
        ({"num_images": 0}, ValueError, "num_images=0"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
        ({"temperature": math.nan}, ValueError, "temperature=nan"),
        ({"feather": "soft"}, ValueError, "feather='soft'"),
        ({"feather_radius_px": -1.0}, ValueError, "feather_radius_px=-1.0"),
        ({"mask_smooth_ksize": 2}, ValueError, "mask_smooth_ksize=2"),
        ({"mask_smooth_passes": -1}, ValueError, "mask_smooth_passes=-1"),
        ({"cfg": 3.0}, TypeError, r"\['cfg'\].*cfg_weight"),
        ({"image": "nowhere.png"}, ValueError, "nowhere.png"),
    ],
    ids=str,
)
def test_wrong_questions_are_refused_before_any_work(editor, pictures, wrong, error, message):
    arguments = {"image": pictures[0], "instruction": "Night."} | wrong
    calls = []
    with pytest.raises(error, match=message):
        editor.edit(**arguments, progress=lambda *_: calls.append(1))
    assert not calls


def test_each_picture_needs_an_instruction(editor, pictures):
    with pytest.raises(ValueError, match="2 pictures and 1 instructions"):
        editor.edit_many(pictures[:2], ["Night."])
    with pytest.raises(ValueError, match="0 pictures"):
        editor.edit_many([], [])


def test_a_checkpoints_own_settings_are_the_defaults(editor, pictures):
    model = editor.model
    try:
        model.clear_config.edit = {"temperature": 0.0, "cfg_weight": 2.0}
        assert Editor(model, editor.processor).settings == EditSettings(temperature=0.0, cfg_weight=2.0)
        model.clear_config.edit = {"invented_later": 1}
        with pytest.raises(ValueError, match="invented_later"):
            Editor(model, editor.processor)
    finally:
        model.clear_config.edit = {}


def test_text_to_image(editor, sizes):
    (greedy,) = editor.generate("a red circle on the left", temperature=0, cfg_weight=5.0)
    assert greedy.size == (sizes.side, sizes.side)
    pictures = editor.generate("a red circle on the left", num_images=3, seed=2)
    assert len({picture.tobytes() for picture in pictures}) == 3
    again = editor.generate("a red circle on the left", num_images=4, seed=2)
    assert all(largest_difference(a, b) <= 2 for a, b in zip(pictures, again))
    (free,) = editor.generate("a red circle on the left", use_cfg=False, temperature=0)
    assert free.size == (sizes.side, sizes.side)
    for wrong in ({"prompt": " "}, {"prompt": "x", "num_images": 0}):
        with pytest.raises(ValueError, match="empty|num_images"):
            editor.generate(**wrong)


def test_text_to_image_is_the_references(base_editor, expected, prompts):
    for key in t2i_keys(expected):
        (picture,) = base_editor.generate(t2i_text(prompts, key), temperature=0, cfg_weight=5.0)
        pixels = ((expected[f"{key}.decoded"].clamp(-1, 1) + 1) / 2 * 255).numpy().transpose(1, 2, 0)
        assert np.abs(np.asarray(picture) - pixels).max() < 1.01, "truncated to bytes"


def test_questions_are_answered_as_the_reference_does(base_editor, golden, expected, prompts, name):
    ids = expected[f"{name}.understand.greedy_ids"]
    path = golden / "images" / f"{name}.png"
    (answer,) = base_editor.describe(path, prompts["question"], max_new_tokens=len(ids))
    assert answer == base_editor.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_answers_can_be_drawn(base_editor, pictures):
    options = {"num_answers": 3, "temperature": 1.0, "max_new_tokens": 8, "seed": 5}
    state, python = torch.get_rng_state(), random.getstate()
    answers = base_editor.describe(pictures[0], "What is it?", **options)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert len(answers) == 3 and len(set(answers)) > 1
    assert base_editor.describe(pictures[0], "What is it?", **options) == answers
    with pytest.raises(ValueError, match="num_answers=3 at temperature 0"):
        base_editor.describe(pictures[0], "What is it?", num_answers=3)
    with pytest.raises(ValueError, match="top_p=2"):
        base_editor.describe(pictures[0], "What is it?", temperature=1.0, top_p=2)


def test_two_threads_edit_with_one_model(golden, pictures, bias):
    """Attention that one thread switches back would make the other's blocks see what they should not."""
    editor = Editor(*load_clear_model(golden / "finetune", base=golden / "checkpoint", attn_implementation="eager"))
    jobs = [(picture, {"seed": seed, "clear_bias": bias}) for seed in range(2) for picture in pictures]
    question = {"temperature": 1.0, "max_new_tokens": 8, "seed": 5}
    edits = [editor.edit(picture, "Night.", **options).class_ids for picture, options in jobs]
    answers = [editor.describe(picture, "What is it?", **question) for picture, _ in jobs]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(3) as threads:
        editing = [threads.submit(editor.edit, picture, "Night.", **options) for picture, options in jobs]
        asking = [threads.submit(editor.describe, picture, "What is it?", **question) for picture, _ in jobs]
        assert all(torch.equal(job.result().class_ids, ids) for job, ids in zip(editing, edits, strict=True))
        assert [job.result() for job in asking] == answers
    assert torch.equal(torch.get_rng_state(), state)
    assert editor.model.token_model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None, "1"], ids=str)
def test_a_seed_that_cannot_key_noise_is_refused_wherever_one_enters(editor, pictures, tmp_path, seed):
    message = rf"seed={seed!r}; expected a whole number from 0 to"
    session = EditSession(editor, pictures[0])
    for call in (
        lambda: editor.edit(pictures[0], "Night.", seed=seed, temperature=0),
        lambda: editor.edit_many(pictures[:1], ["Night."], seed=seed),
        lambda: editor.generate("a red circle", seed=seed),
        lambda: editor.describe(pictures[0], "What is it?", seed=seed),
        lambda: session.edit("Night.", seed=seed),
        lambda: edit_items(editor, [], tmp_path / "out", run={}, seed=seed),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "out").exists() and not session.history


def forget_prefixes():
    """What is kept of the row that tells nothing, as in a new process."""
    cache._PREFIXES.clear()


@pytest.fixture
def widths(editor):
    """Rows of the batch in each pass of the language model."""
    found = []
    hook = editor.model.token_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    yield found
    hook.remove()


def test_a_prompt_is_read_once_for_all_its_samples(editor, pictures, bias, widths):
    forget_prefixes()
    for told in (3, 2):  # the row that tells nothing is read in the first call alone
        widths.clear()
        editor.edit_many(pictures[:2], INSTRUCTIONS[:2], num_images=4, clear_bias=bias)
        assert widths[:2] == [2 * told, 2 * 3 * 4]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({}, 3), ({"cfg_weight2": 0.0}, 2), ({"cfg_weight2": 0.0, "cfg_weight": 1.0}, 1), ({"use_cfg": False}, 1)],
    ids=str,
)
def test_guidance_rows_without_weight_are_not_decoded(editor, pictures, bias, widths, settings, rows):
    forget_prefixes()
    editor.edit(pictures[0], INSTRUCTIONS[0], clear_bias=bias, **settings)
    assert set(widths) == {rows}


def test_the_row_that_tells_nothing_is_kept_while_the_weights_are_the_same(editor, pictures, bias, widths):
    language_model = editor.model.token_model.language_model
    words = ["Night.", "Make it a very long and cold night, with snow on every roof.", "Day."]
    fresh = []
    for instruction in words:
        forget_prefixes()
        fresh.append(editor.edit(pictures[0], instruction, clear_bias=bias, seed=3))
    for instruction, expected in zip(words[::-1], fresh[::-1]):  # shorter and longer ones than what is kept
        found = editor.edit(pictures[0], instruction, clear_bias=bias, seed=3)
        assert torch.equal(found.class_ids, expected.class_ids)

    def rows_read():
        widths.clear()
        editor.edit(pictures[0], words[0], clear_bias=bias, seed=3)
        return widths[0]

    assert rows_read() == 2
    weight = language_model.norm.weight
    with torch.no_grad():
        weight.mul_(1.0)
    assert rows_read() == 3 and rows_read() == 2, "a weight that was written in place"
    old, language_model.norm.weight = weight, torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    assert rows_read() == 3 and rows_read() == 2, "a weight that was replaced"
    language_model.norm.weight = old
    assert rows_read() == 3


def test_finished_pictures_leave_the_batch(editor, pictures, sizes, widths):
    """All CLEAR is done after one pass over all positions; the others go on without it."""
    options = {"temperature": 0, "block": sizes.positions}
    gates = [editor.edit(picture, "Night.", clear_bias=1e4, **options).gate for picture in pictures]
    lowest = sorted(gate.min().item() for gate in gates)
    widths.clear()
    bias = 1e4 - (lowest[-1] + lowest[-2]) / 2  # copies the whole of one picture only
    results = editor.edit_many(pictures, ["Night."] * 3, clear_bias=bias, **options)
    assert sorted(r.clear_fraction == 1 for r in results) == [False, False, True]
    assert max(widths) == 9 and widths[-1] < 9
    alone = [editor.edit(picture, "Night.", clear_bias=bias, **options) for picture in pictures]
    assert all(torch.equal(a.class_ids, b.class_ids) for a, b in zip(alone, results))
