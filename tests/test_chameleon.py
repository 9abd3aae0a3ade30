"""Chameleon keeps what every family keeps, and computes what the original of "Thinking with Generated Images" does."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN_ROOT
from family_checks import CHECKS, check_what_is_saved_is_what_is_loaded
from PIL import Image
from safetensors.torch import load_file

from thinkclearly.images import to_image
from thinkclearly.models.chameleon.processor import TEMPLATES
from thinkclearly.models.load import load_checkpoint, token_model
from thinkclearly.sequence import Row, answering, drawing, named_row

ROOT = GOLDEN_ROOT / "chameleon_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]
PICTURES = sorted(path.stem for path in (ROOT / "images").glob("*.png"))
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(str(ROOT / "checkpoint"))


@pytest.fixture(scope="module")
def wanted():
    return load_file(ROOT / "expected.safetensors")


@pytest.fixture(scope="module")
def values():
    return json.loads((ROOT / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prompts():
    return json.loads((ROOT / "prompts.json").read_text(encoding="utf-8"))


def square(checkpoint, name):
    return checkpoint.processor.square(Image.open(ROOT / "images" / f"{name}.png"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_chameleon_keeps_what_every_family_keeps(checkpoint, check):
    check(checkpoint)


def test_what_is_saved_is_what_is_loaded(checkpoint, tmp_path):
    check_what_is_saved_is_what_is_loaded(checkpoint, load_checkpoint, tmp_path / "saved")


def test_saving_as_transformers_does_keeps_the_decoder(checkpoint, tmp_path):
    checkpoint.network.save_pretrained(tmp_path)
    checkpoint.processor.save_pretrained(tmp_path)
    again = load_checkpoint(str(tmp_path))
    decoder, kept = (each.network.model.vqmodel.decoder.state_dict() for each in (checkpoint, again))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in decoder.items())


# ---- as the original ---------------------------------------------------------------------------------------------


def test_special_tokens_are_the_originals(checkpoint, values):
    processor, ids = checkpoint.processor, values["constants"]
    for name in ("bos", "pad", "eos", "sep", "image", "boi", "eoi"):
        assert getattr(processor, f"{name}_id") == ids[name]
    assert processor.num_image_tokens == ids["n_image_tokens"]


def test_codes_have_the_token_ids_that_the_original_gives_them(checkpoint, wanted):
    ids = wanted["id_map.vq_to_bpe"].long()
    assert torch.equal(checkpoint.token_model.code_ids, ids)
    assert checkpoint.processor.code_ids == ids.tolist() != sorted(ids.tolist())


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_become_the_originals_codes(checkpoint, wanted, name):
    pixels = checkpoint.processor.pixel_values([square(checkpoint, name)])
    assert torch.equal(pixels[0], wanted[f"{name}.pixel_values"].view_as(pixels[0]))
    codes = checkpoint.token_model.encode(pixels)
    assert torch.equal(codes.flatten(), wanted[f"{name}.vq_ids"].flatten().long())
    assert checkpoint.processor.picture_ids(codes[0].tolist())[1:-1] == wanted[f"{name}.bpe_ids"].flatten().tolist()


@pytest.mark.parametrize("name", PICTURES)
def test_codes_become_the_originals_pictures(checkpoint, wanted, name):
    decoded = checkpoint.token_model.decode(wanted[f"{name}.vq_ids"].long().view(1, -1))[0]
    original = wanted[f"{name}.decoded"].view_as(decoded)
    torch.testing.assert_close(decoded, (original + 1) / 0.0078 / 127.5 - 1, **TOLERANCE)
    levels = np.asarray(to_image(decoded), int).transpose(2, 0, 1)
    assert np.abs(levels - wanted[f"{name}.postprocessed"].view_as(decoded).numpy()).max() <= 1


def test_words_become_the_originals_token_ids(checkpoint, values):
    processor = checkpoint.processor
    texts = {name: found for name, found in values["text"].items() if "string" in found}
    assert texts
    for found in texts.values():
        assert processor.encode_words(found["string"], bos=False) == found["ids_without_bos"]
        assert processor.encode_words(found["string"], bos=True) == found["ids_with_bos"]


def test_templates_are_the_originals(prompts):
    assert TEMPLATES["general"].format(p="A cat.") == "A cat."
    assert TEMPLATES["critique"] == prompts["templates"]["critique"]
    assert TEMPLATES["subgoals"] == prompts["templates"]["object"]


def test_a_prompt_with_a_picture_has_the_ids_of_the_originals_processor(checkpoint, values, prompts):
    processor = checkpoint.processor
    before, _, after = prompts["raw"]["general_image"].partition("<image>")
    placeholders = [processor.boi_id, *[processor.image_id] * processor.num_image_tokens, processor.eoi_id]
    ids = processor.encode_words(before, bos=True) + placeholders + processor.encode_words(after, bos=False)
    assert ids == values["processor_ids"]["return_for_text_completion=True"]
    assert processor.decode_words(ids) == values["decode"]["skip_special_tokens"] == before + after


@torch.no_grad()
def test_hidden_states_and_logits_are_the_originals(checkpoint, wanted):
    family, ids = checkpoint.token_model, wanted["example0.input_ids"].long()[None]
    hidden = family.language_model(inputs_embeds=family.embed_words(ids)).last_hidden_state
    torch.testing.assert_close(hidden[0], wanted["example0.last_hidden_state"], **TOLERANCE)
    logits = wanted["example0.logits"]
    torch.testing.assert_close(family.word_logits(hidden)[0], logits, **TOLERANCE)
    torch.testing.assert_close(family.code_logits(hidden)[0], logits[:, family.code_ids], **TOLERANCE)


def test_features_of_the_codebook_are_what_the_original_learns_to_rebuild(checkpoint, wanted):
    family = checkpoint.token_model
    order = family.code_ids.argsort()  # the original keeps them by token id
    features = family.codebook_features(order)
    assert torch.equal(features, wanted["loss.E"]) and features.shape[1] == family.feature_size


# ---- rows --------------------------------------------------------------------------------------------------------


def real(batch):
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask)]


def test_what_decoding_keeps_of_the_vocabulary_serves_training_too(checkpoint):
    family = token_model(checkpoint.network)
    with torch.inference_mode():
        kept = family._ids_on(torch.device("meta"))  # any device but the one that it is made on
    assert not kept.is_inference()  # autograd refuses to keep such a tensor for the backward pass


def test_a_row_to_draw_from_is_a_turn_and_the_beginning_of_a_picture(checkpoint):
    p = checkpoint.processor
    sample, words = drawing("Make it blue.", [0]), p.encode_words("Make it blue.", bos=False)
    batch = p.rows([named_row(sample, name) for name in ("full", "no_source", "uncond")])
    picture = [p.boi_id, *[p.image_id] * p.num_image_tokens, p.eoi_id]
    plain = [p.bos_id, *words, p.sep_id, p.boi_id]
    assert real(batch) == [[p.bos_id, *picture, *words, p.sep_id, p.boi_id], plain, [p.boi_id]]
    assert batch.known_slots.tolist() == [[2], [-1], [-1]] and batch.seen_slots.tolist() == [[-1]] * 3


def test_the_codes_that_are_drawn_follow_the_prompt(checkpoint):
    p = checkpoint.processor
    batch = p.rows([named_row(drawing("Blue."), name) for name in ("full", "uncond")], outputs=True)
    assert batch.drawn_slots.tolist() == [batch.input_ids.shape[1] - p.num_image_tokens + 1] * 2
    before = batch.input_ids.gather(1, batch.drawn_slots[:, None] - 1)
    assert (before == p.boi_id).all()


def test_a_question_ends_its_turn_before_the_answer(checkpoint):
    p = checkpoint.processor
    batch = p.rows([Row(answering("What is it?", [0], " A cat. "))])
    ids = real(batch)[0]
    answer = p.answer_ids("A cat.")
    assert answer[-1] == p.eos_id and p.decode_words(answer) == "A cat."
    assert ids[-len(answer) - 1 :] == [p.sep_id, *answer] and batch.seen_slots.tolist() == [[2]]


def test_words_are_withheld_only_with_everything_else(checkpoint):
    sample = drawing("Blue.", [0])
    with pytest.raises(ValueError, match="only together with everything else"):
        checkpoint.processor.rows([Row(sample, frozenset({2}))])


def test_a_picture_reads_the_same_by_its_pixels_and_by_its_codes(checkpoint):
    family = checkpoint.token_model
    pixels = checkpoint.processor.pixel_values([square(checkpoint, PICTURES[0])])
    codes = family.encode(pixels)
    prompt = checkpoint.processor.rows([Row(answering("What is it?", [0]))])
    by_pixels = family.embed_prompt(prompt, family.see(pixels))
    assert torch.equal(by_pixels, family.embed_prompt(prompt, codes=codes))
    assert torch.equal(by_pixels[0, 2 : 2 + codes.shape[1]], family.embed_words(family.code_ids[codes[0]]))
