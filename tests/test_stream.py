"""Scores of whole streams are those of the original's own training code."""

import json

import pytest
import torch
from conftest import GOLDEN_ROOT
from safetensors.torch import load_file

from thinkclearly.data.interleaved import read_thoughts, tokenize_thoughts
from thinkclearly.data.streams import StreamCollator
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.cross_entropy import score_words
from thinkclearly.models.instruction_head import ClearConfig
from thinkclearly.models.load import load_checkpoint
from thinkclearly.models.stream import StreamModel

ROOT = GOLDEN_ROOT / "chameleon_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]
TOLERANCE = 1e-4
CONVENTIONS = {"own": "original", "next": "predictive"}
BATCH = "batch_labels_padded_with_-100"


@pytest.fixture(scope="module")
def wanted():
    return load_file(ROOT / "expected.safetensors")


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(str(ROOT / "checkpoint"))


@pytest.fixture(scope="module")
def batches(checkpoint, tmp_path_factory):
    """Name of a golden batch → our own collation of the records it is made of."""
    folder = tmp_path_factory.mktemp("prepared")
    pictures, words = (
        list(tokenize_thoughts(read_thoughts(ROOT / f"{name}.jsonl"), checkpoint, folder)[0])
        for name in ("examples", "examples_text_only")
    )
    vocabulary = InstructionVocabulary(checkpoint.token_model.codebook_size, ())
    records = {f"example{i}": [row] for i, row in enumerate(pictures)} | {"text_only": words, BATCH: pictures}
    collate = StreamCollator(checkpoint.processor, vocabulary)
    return {name: collate(rows) for name, rows in records.items()}


def model_of(checkpoint, wanted, at):
    config = ClearConfig(checkpoint.token_model.codebook_size, instructions=[])
    model = StreamModel(checkpoint.network, config, at)
    model.projection.load_state_dict({"weight": wanted["loss.W"], "bias": wanted["loss.b"]})
    return model


def losses(model, batch):
    """Cross-entropy and reconstruction, as the trainer reduces them."""
    scores = model(**batch)
    elements = max(1, batch["picture_codes"].numel() * model.token_model.feature_size)
    return scores.nll.mean(), scores.squared_error.sum() / elements


def test_ids_masks_and_labels_are_the_originals_and_padding_has_no_label(batches, wanted):
    for name, batch in batches.items():
        expected = {part: wanted[f"{name}.{part}"].long() for part in ("input_ids", "attention_mask", "labels")}
        labels = torch.full_like(batch["input_ids"], -100)
        labels[batch["word_rows"], batch["word_columns"] + 1] = batch["word_labels"]
        for part, value in (batch | {"labels": labels}).items():
            if part in expected:
                assert torch.equal(value, expected[part].view_as(value)), (name, part)


@pytest.mark.parametrize("at", CONVENTIONS)
def test_both_losses_are_the_originals_at_its_own_and_at_predictive_positions(checkpoint, batches, wanted, at):
    model = model_of(checkpoint, wanted, at)
    for name, batch in batches.items():
        with torch.no_grad():
            ce, reconstruction = losses(model, batch)
        assert ce.item() == pytest.approx(wanted[f"{name}.loss.ce"].item(), abs=TOLERANCE), name
        expected = wanted[f"{name}.loss.rec_{CONVENTIONS[at]}_positions"].item()
        assert reconstruction.item() == pytest.approx(expected, abs=TOLERANCE), name
        total = wanted[f"{name}.loss.total_{CONVENTIONS[at]}"].item()
        assert (ce + reconstruction).item() == pytest.approx(total, abs=2 * TOLERANCE), name
    assert len(batches) >= 4


@torch.no_grad()
def test_labels_that_are_padded_with_1_as_the_originals_give_its_loss_and_not_ours(checkpoint, batches, wanted):
    name, batch = "batch_labels_padded_with_1", batches[BATCH]
    labels, family = wanted[f"{name}.labels"].long(), checkpoint.token_model
    rows, columns = torch.nonzero(labels != -100, as_tuple=True)
    hidden = family.language_model(
        inputs_embeds=family.embed_words(batch["input_ids"]), attention_mask=batch["attention_mask"]
    ).last_hidden_state
    nll, _ = score_words(family.word_logits, hidden[rows, columns - 1], labels[rows, columns])
    assert nll.mean().item() == pytest.approx(wanted[f"{name}.loss.ce"].item(), abs=TOLERANCE)
    assert len(nll) > len(batch["word_labels"])
    assert abs(nll.mean().item() - wanted[f"{BATCH}.loss.ce"].item()) > 100 * TOLERANCE


def test_gradients_are_the_originals_and_the_tokenizer_has_none(wanted, batches):
    expected = json.loads((ROOT / "expected.json").read_text())
    for name in (name for name in batches if f"{name}.grad.loss_W" in wanted):
        checkpoint = load_checkpoint(str(ROOT / "checkpoint"))
        model = model_of(checkpoint, wanted, "own")
        model.base.requires_grad_(True)
        sum(losses(model, batches[name])).backward()
        torch.testing.assert_close(model.projection.weight.grad, wanted[f"{name}.grad.loss_W"], atol=1e-5, rtol=1e-4)
        found = {key: p.grad for key, p in model.base.named_parameters() if p.grad is not None}
        assert sum("vqmodel" in key for key in found) == expected[f"{name}.vq_parameters_with_gradient"] == 0
        norms = {"grad_norm_total_original.model": torch.nn.utils.get_total_norm(found.values())}
        norms |= {f"grad.{key}_norm": found[place].norm() for key, place in PLACES.items()}
        for key, norm in norms.items():
            assert norm.item() == pytest.approx(wanted[f"{name}.{key}"].item(), rel=1e-4), key


PLACES = {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}


def test_the_codebook_rows_are_those_that_the_originals_table_holds(checkpoint, wanted):
    ids, order = checkpoint.token_model.code_ids.sort()
    assert torch.equal(ids, wanted["id_map.sorted_image_ids"].long())
    torch.testing.assert_close(checkpoint.token_model.codebook_features(order), wanted["loss.E"])
