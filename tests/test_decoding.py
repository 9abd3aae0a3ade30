"""One decoding loop gives what the reference does: text-to-image, three-row edits, the original's CLEAR fine-tune."""

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from janus_reference import between, pictures_of, t2i_keys, t2i_text
from torch.nn.functional import pad

from thinkclearly.decoding.cache import masked_attention
from thinkclearly.decoding.engine import GROWTH, MAX_BLOCK, MIN_BLOCK, decode
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.models.finetunes import load_base, load_clear_model
from thinkclearly.sequence import FULL, NO_SOURCE, UNCOND, Row, answering, drawing, named_rows

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base(golden):
    return load_base(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def finetune(golden):
    return load_clear_model(str(golden / "finetune"), base=str(golden / "checkpoint"))


EDIT, DRAW = (FULL, NO_SOURCE, UNCOND), (FULL, UNCOND)


def edit_rows(pair, expected, prompts, name, names):
    model, processor = pair
    rows = processor.rows(named_rows([drawing(prompts["instructions"][name], [0])], names))
    features = model.token_model.see(expected[f"{name}.pixel_values"][None])
    source = expected[f"{name}.image_tokens"][None]
    return rows, model.token_model.embed_prompt(rows, features, source), source


def weighed(settings, names):
    """Janus-4o's weights of all the rows that there are, those of weight 0 among them."""
    if len(names) == 1:
        return {FULL: 1.0}
    w, w2 = settings.cfg_weight, settings.cfg_weight2 if NO_SOURCE in names else 0.0
    table = {FULL: w / (1 + w2), NO_SOURCE: w * w2 / (1 + w2), UNCOND: 1 - w}
    return {name: table[name] for name in names}


def copied_from(source):
    """The draft, and the codes that CLEAR stands for."""
    return {"source_tokens": source, "transformed": source.unsqueeze(1)}


@pytest.mark.golden
def test_prompts_are_the_reference_ids(base, expected, prompts):
    _, processor = base
    for name in pictures_of(expected):
        rows = processor.rows([Row(drawing(prompts["instructions"][name], [0]))])
        assert rows.input_ids[0].tolist() == expected[f"{name}.edit.input_ids"].tolist()
        rows = processor.rows([Row(answering(prompts["question"], [0]))])
        assert rows.input_ids[0].tolist() == expected[f"{name}.understand.input_ids"].tolist()


@pytest.mark.golden
def test_three_row_edit_matches_the_reference(base, expected, prompts):
    for name in pictures_of(expected):
        rows, embeds, _ = edit_rows(base, expected, prompts, name, EDIT)
        decoded = decode(
            base[0],
            embeds,
            rows.attention_mask,
            base[1].num_image_tokens,
            settings := DecodeSettings(temperature=0),
            rows=weighed(settings, EDIT),
            samples=[(0, 0)],
            keep_logits=True,
        )
        assert decoded.codes[0].tolist() == expected[f"{name}.edit.greedy_tokens"].tolist()
        steps = expected[f"{name}.edit.guided_logits"].shape[0]
        torch.testing.assert_close(
            decoded.logits[0, :steps], expected[f"{name}.edit.guided_logits"], atol=TOLERANCE, rtol=TOLERANCE
        )


@pytest.mark.golden
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_blocks_are_masked_whatever_attention_the_model_was_loaded_with(golden, expected, prompts, implementation):
    pair = load_base(str(golden / "checkpoint"), attn_implementation=implementation)
    name = pictures_of(expected)[0]
    rows, embeds, source = edit_rows(pair, expected, prompts, name, EDIT)
    settings = DecodeSettings(temperature=0, block=6)
    decoded = decode(
        pair[0],
        embeds,
        rows.attention_mask,
        pair[1].num_image_tokens,
        settings,
        rows=weighed(settings, EDIT),
        samples=[(0, 0)],
        source_tokens=source,
    )
    assert decoded.codes[0].tolist() == expected[f"{name}.edit.greedy_tokens"].tolist()
    assert pair[0].token_model.language_model.config._attn_implementation == implementation


@pytest.mark.golden
def test_text_to_image_matches_the_reference(base, expected, prompts):
    for key in t2i_keys(expected):
        text = t2i_text(prompts, key)
        rows = base[1].rows(named_rows([drawing(text)], DRAW))
        assert rows.input_ids[0].tolist() == expected[f"{key}.input_ids"].tolist()
        decoded = decode(
            base[0],
            base[0].token_model.embed_prompt(rows),
            rows.attention_mask,
            base[1].num_image_tokens,
            settings := DecodeSettings(temperature=0),
            rows=weighed(settings, DRAW),
            samples=[(0, 0)],
        )
        assert decoded.fed_codes[0].tolist() == expected[f"{key}.greedy_tokens"].tolist()


@pytest.mark.golden
@pytest.mark.parametrize("mode", ["one_row", "guided"])
def test_original_finetune_decodes_as_the_original_did(golden, finetune, expected, expected_finetune, prompts, mode):
    settings = json.loads((golden / "finetune_settings.json").read_text())[mode]
    names = EDIT if mode == "guided" else (FULL,)
    settings = DecodeSettings(guidance="joint", temperature=0, **settings)
    for name in pictures_of(expected):
        rows, embeds, source = edit_rows(finetune, expected, prompts, name, names)
        decoded = decode(
            finetune[0],
            embeds,
            rows.attention_mask,
            finetune[1].num_image_tokens,
            settings,
            rows=weighed(settings, names),
            samples=[(0, 0)],
            **copied_from(source),
            keep_logits=True,
        )
        assert decoded.class_ids[0].tolist() == expected_finetune[f"{name}.{mode}.ids"].tolist()
        assert decoded.fed_codes[0].tolist() == expected_finetune[f"{name}.{mode}.mapped_tokens"].tolist()
        wanted = expected_finetune[f"{name}.{mode}.logits"]
        torch.testing.assert_close(decoded.logits[0], wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def edits(finetune, expected, prompts):
    """Embedded rows and source tokens of all golden edits, and the log-odds that put half of the patches on copy."""

    def embedded(names):
        model, processor = finetune
        rows = [edit_rows(finetune, expected, prompts, name, names) for name in pictures_of(expected)]
        longest = max(embeds.shape[1] for _, embeds, _ in rows)
        pads = [longest - embeds.shape[1] for _, embeds, _ in rows]
        embeds = torch.cat([pad(e, (0, 0, n, 0)) for (_, e, _), n in zip(rows, pads)])
        mask = torch.cat([pad(r.attention_mask, (n, 0)) for (r, _, _), n in zip(rows, pads)])
        return embeds, mask, torch.cat([source for _, _, source in rows])

    return {count: (*embedded(EDIT[:count]), EDIT[:count]) for count in (1, 3)}


def decoded_in_blocks(pair, rows, settings, block, seed=0, copy=True):
    embeds, mask, source, names = rows
    return decode(
        pair[0],
        embeds,
        mask,
        pair[1].num_image_tokens,
        replace(settings, block=block),
        rows=weighed(settings, names),
        **(copied_from(source) if copy else {}),
        samples=[(seed, k) for k in range(len(source))],
        keep_logits=True,
    )


@pytest.mark.golden
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "cfg_weight": 2.0},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.9, "cfg_weight2": 0.0},
        {"temperature": 0.0, "guidance": "joint"},
        {"temperature": 1.0, "guidance": "joint", "top_p": 0.95},
        {"temperature": 1.0, "use_cfg": False},
    ],
    ids=str,
)
def test_any_block_length_gives_the_tokens_of_one_by_one(finetune, edits, settings):
    settings = DecodeSettings(**settings)
    rows = edits[3 if settings.use_cfg else 1]
    gate = decoded_in_blocks(finetune, rows, settings, 1).gate
    for seed, share in enumerate((0.5, 0.1)):
        settings = replace(settings, clear_bias=-between(gate, share))
        one = decoded_in_blocks(finetune, rows, settings, 1, seed)
        assert one.passes == one.class_ids.shape[1]
        for block in (0, 2, 5, one.class_ids.shape[1], 1000):
            many = decoded_in_blocks(finetune, rows, settings, block, seed)
            for name in ("class_ids", "fed_codes", "codes"):
                assert torch.equal(getattr(many, name), getattr(one, name))
            torch.testing.assert_close(many.gate, one.gate, atol=TOLERANCE, rtol=TOLERANCE)
            # Guidance multiplies the rounding of the rows by their weights.
            torch.testing.assert_close(many.logits, one.logits, atol=2 * TOLERANCE, rtol=TOLERANCE)
            assert many.passes <= one.passes
            assert [sum(column) for column in zip(*many.accepted)] == [one.class_ids.shape[1]] * len(one.class_ids)


@pytest.mark.golden
def test_what_is_copied_costs_one_pass_a_block(finetune, edits):
    settings, positions = DecodeSettings(clear_bias=1e6), edits[3][2].shape[1]
    for block in (positions, 12, 5):
        assert decoded_in_blocks(finetune, edits[3], settings, block).passes == math.ceil(positions / block)
    lengths = [max(2 * MIN_BLOCK, math.isqrt(positions))]
    while sum(lengths) < positions:
        lengths.append(min(math.ceil(GROWTH * lengths[-1]), MAX_BLOCK))
    assert decoded_in_blocks(finetune, edits[3], settings, 0).passes == len(lengths)


@pytest.mark.golden
def test_the_source_draft_alone_takes_a_pass_for_each_token_that_is_not_the_sources(finetune, edits):
    settings = DecodeSettings(temperature=0.0, jacobi=False)
    gate = decoded_in_blocks(finetune, edits[3], settings, 1).gate
    for share in (0.5, 0.1):
        settings = replace(settings, clear_bias=-between(gate, share))
        one = decoded_in_blocks(finetune, edits[3], settings, 1)
        whole = decoded_in_blocks(finetune, edits[3], settings, one.class_ids.shape[1])
        assert torch.equal(whole.fed_codes, one.fed_codes) and torch.equal(whole.codes, one.codes)
        wrong = one.fed_codes != edits[3][2]
        assert whole.passes == max(int(row.sum()) + int(not row[-1]) for row in wrong)
        guessed = decoded_in_blocks(finetune, edits[3], replace(settings, jacobi=True), one.class_ids.shape[1])
        assert torch.equal(guessed.fed_codes, one.fed_codes) and guessed.passes <= one.passes


@pytest.mark.golden
def test_without_copying_blocks_change_nothing_either(base, edits):
    """Text-to-image, and an untuned base, whose draft is the source's plain tokens."""
    for copy in (True, False):
        settings = DecodeSettings(temperature=0.7)
        one = decoded_in_blocks(base, edits[3], settings, 1, copy=copy)
        for block in (0, 7):
            many = decoded_in_blocks(base, edits[3], settings, block, copy=copy)
            assert torch.equal(many.fed_codes, one.fed_codes) and many.passes <= one.passes


def test_two_threads_share_a_models_attention_and_leave_it_as_it_was(golden):
    pair = load_base(str(golden / "checkpoint"), attn_implementation="eager")
    language_model, seen = pair[0].token_model.language_model, []
    first_is_in, second_is_in = threading.Event(), threading.Event()

    def first():
        with masked_attention(language_model):
            first_is_in.set()
            second_is_in.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(60)
    with masked_attention(language_model):
        second_is_in.set()
        thread.join()
        seen.append(language_model.config._attn_implementation)
    assert seen == ["sdpa"], "the first one out took it from the second"
    assert language_model.config._attn_implementation == "eager"


def test_infinite_weights_and_biases_are_refused():
    for name in ("cfg_weight", "cfg_weight2", "clear_bias"):
        for value in (float("inf"), float("-inf"), float("nan")):
            with pytest.raises(ValueError, match=f"{name}={value}; expected a finite number"):
                DecodeSettings(**{name: value})


@pytest.mark.slow
def test_a_compiled_language_model_gives_the_same_tokens(golden, edits):
    """With dynamic shapes two graphs serve any prompt, block and place: the first pass and all others."""
    pair = load_clear_model(golden / "finetune", base=golden / "checkpoint")
    settings = DecodeSettings(temperature=0.0)
    gate = decoded_in_blocks(pair, edits[3], settings, 1).gate
    settings = replace(settings, clear_bias=-between(gate))
    plain = [decoded_in_blocks(pair, edits[3], settings, block) for block in (0, 5)]
    torch._dynamo.reset()
    pair[0].token_model.language_model.compile(dynamic=True)
    for block, expected in zip((0, 5), plain):
        found = decoded_in_blocks(pair, edits[3], settings, block)
        assert torch.equal(found.fed_codes, expected.fed_codes) and torch.equal(found.class_ids, expected.class_ids)
    assert torch._dynamo.utils.counters["frames"]["ok"] == 2
