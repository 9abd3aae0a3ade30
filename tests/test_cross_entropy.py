"""The objective is the reference's, its chunks add up to the whole, and the gate's figures are what they say."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tiny_runs import CODES, POSITIONS, batch_of, fresh, records

from thinkclearly.instructions import InstructionVocabulary, gate_log_odds
from thinkclearly.models import cross_entropy as scores
from thinkclearly.models.cross_entropy import weighted_loss
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.sequence import FULL, NO_SOURCE, UNCOND, Row, drawing, named_row
from thinkclearly.training.clear import GateMeter

TOLERANCE = 1e-4


def weighted(labels, codes, weight):
    return InstructionVocabulary(codes).weights(labels, weight)


@pytest.fixture(scope="module")
def finetune(golden):
    return load_clear_model(golden / "finetune", base=golden / "checkpoint")


def test_weighted_loss_is_torch_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, CODES + 1, generator=generator)
    labels = torch.randint(CODES - 2, CODES + 1, (3, 5), generator=generator)
    weight = torch.ones(CODES + 1)
    weight[CODES] = 0.3
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)
    nll = scores.score_logits(logits, labels, CODES).nll
    weights = weighted(labels, CODES, 0.3)
    torch.testing.assert_close(weighted_loss(nll, weights), expected)
    parts = [weighted_loss(nll[i], weights[i], total=weight[labels].sum()) for i in range(3)]
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.golden
def test_forward_and_loss_are_the_originals(finetune, expected, expected_finetune, prompts, name):
    (model, processor), wanted = finetune, expected_finetune
    codes = model.vocabulary.codebook_size
    row = Row(drawing(prompts["instructions"][name], [0]))
    inputs = vars(processor.rows([row], outputs=True))
    labels = torch.where(wanted[f"{name}.clear_labels"], codes, wanted[f"{name}.target_tokens"])[None]
    source = expected[f"{name}.image_tokens"][None]
    inputs |= {
        "transformed": source.unsqueeze(1),
        "source_tokens": expected[f"{name}.image_tokens"][None],
        "pixel_values": expected[f"{name}.pixel_values"][None],
        "labels": labels,
    }
    with torch.no_grad():
        logits = model.teacher_forced_logits(**inputs)
        torch.testing.assert_close(logits[0], wanted[f"{name}.teacher_logits"], atol=TOLERANCE, rtol=TOLERANCE)
        # As the original trained: the picture slot keeps its placeholder embeddings.
        nll = {"filled": model(**inputs).nll, "original": model(**inputs | {"seen_slots": torch.tensor([[-1]])}).nll}
    for kind, values in nll.items():
        for weight in (0.3, 1.0):
            found = weighted_loss(values, weighted(labels, codes, weight))
            expected_loss = wanted[f"{name}.loss.{kind}.clear_weight_{weight}"]
            torch.testing.assert_close(found, expected_loss, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_clear_label_feeds_the_source_back(golden, finetune):
    rows = records(golden, 1)
    batch = batch_of(finetune, rows)
    same = dict(batch, labels=torch.where(batch["labels"] == CODES, batch["source_tokens"], batch["labels"]))
    with torch.no_grad():
        logits = [finetune[0].teacher_forced_logits(**inputs) for inputs in (batch, same)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("with_pictures", [True, False])
def test_a_left_padded_batch_gives_the_same_logits_as_one_by_one(golden, finetune, with_pictures):
    model, processor = finetune
    rows = records(golden, 3)
    names = (FULL, NO_SOURCE, UNCOND)
    shown = [named_row(drawing(row["instruction"], [i]), name) for i, (row, name) in enumerate(zip(rows, names))]
    prompt = processor.rows(shown, outputs=True)
    assert not prompt.attention_mask.all(), "the prompts should differ in length"
    batch = {
        "source_tokens": torch.tensor([row["input_tokens"] for row in rows]),
        "labels": torch.tensor([row["output_tokens"] for row in rows]),
    }
    batch["transformed"] = batch["source_tokens"].unsqueeze(1)
    if with_pictures:
        batch["pixel_values"] = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model.teacher_forced_logits(**vars(prompt), **batch)
        for i, name in enumerate(names):
            alone = vars(processor.rows([named_row(drawing(rows[i]["instruction"], [0]), name)], outputs=True))
            one = model.teacher_forced_logits(**alone, **{key: value[i : i + 1] for key, value in batch.items()})
            torch.testing.assert_close(together[i : i + 1], one, atol=1e-5, rtol=1e-5)


def test_gate_meter_counts_rows_that_see_the_source():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, POSITIONS, CODES + 1, generator=generator)
    logits[..., CODES] += 2
    labels = torch.randint(0, CODES + 1, (4, POSITIONS), generator=generator)
    labels[:, ::2] = CODES
    logits[..., CODES] += (labels == CODES) * 1.0
    sees = torch.tensor([True, False, True, False])
    meter = GateMeter(InstructionVocabulary(CODES), torch.device("cpu"))
    meter.update(scores.score_logits(logits, labels, CODES), labels, torch.zeros(4, dtype=torch.bool))
    assert meter.compute() == {}, "nothing seen, nothing said"
    for part in (slice(0, 2), slice(2, 4)):
        meter.update(scores.score_logits(logits[part], labels[part], CODES), labels[part], sees[part])
    values = meter.compute()
    seen, true = logits[sees], labels[sees]
    codes = true < CODES
    assert values["clear_rate_true"] == pytest.approx((~codes).float().mean().item())
    assert values["clear_rate_predicted"] == pytest.approx((seen.argmax(-1) == CODES).float().mean().item())
    assert values["accuracy"] == pytest.approx((seen.argmax(-1) == true).float().mean().item())
    hits = (seen[..., :CODES].argmax(-1) == true)[codes]
    assert values["code_accuracy"] == pytest.approx(hits.float().mean().item())
    auc = roc_auc_score((~codes).flatten(), gate_log_odds(seen, CODES).flatten())
    assert values["gate_auc"] == pytest.approx(auc, abs=0.01)


@pytest.mark.parametrize("chunk", [1, 7, 64, 107, 108, 1000])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_chunks_give_the_loss_and_gradients_of_the_whole(golden, monkeypatch, chunk, full):
    model, processor = pair = fresh(golden)
    if full:
        model.token_model.parts()["generation_head"].requires_grad_(True)
    batch = batch_of(pair, records(golden, 3))
    labels = batch["labels"]

    def gradients(nll):
        model.zero_grad()
        weighted_loss(nll, weighted(labels, CODES, 0.3)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    logits = model.teacher_forced_logits(**batch)
    whole = scores.score_logits(logits, labels, CODES)
    expected = gradients(whole.nll)
    monkeypatch.setattr(scores, "CHUNK", chunk)
    found = model(**batch)
    for name in ("predicted", "code"):
        assert torch.equal(found[name], whole[name]) and found[name].shape == labels.shape
    for name in ("nll", "gate"):
        torch.testing.assert_close(found[name], whole[name], rtol=1e-6, atol=1e-6)
    assert not found.gate.requires_grad
    for name, gradient in gradients(found.nll).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected.pop(name), rtol=1e-6, atol=2e-6 * scale)
    assert not expected


def test_a_chunk_of_logits_is_all_that_is_kept_for_backward(golden, monkeypatch):
    pair = fresh(golden)
    batch, kept = batch_of(pair, records(golden, 3)), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        monkeypatch.setattr(scores, "CHUNK", 25)
        pair[0](**batch)
    wide = [tensor for tensor in kept.values() if CODES + 1 in tensor.shape]
    assert [tensor.shape[0] for tensor in wide] == [20], "the last of 22 + 22 + 22 + 22 + 20 positions"


def test_dropout_in_the_head_is_the_same_when_a_chunk_is_computed_again(monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, CODES + 1))
    hidden, labels = torch.randn(2, 9, 8, requires_grad=True), torch.randint(0, CODES + 1, (2, 9))
    monkeypatch.setattr(scores, "CHUNK", 5)
    slopes = []
    for checkpointed in (True, False):
        if not checkpointed:
            monkeypatch.setattr(scores, "checkpoint", lambda function, *args, use_reentrant: function(*args))
        torch.manual_seed(1)
        slopes.append(torch.autograd.grad(scores.score_hidden(head, hidden, labels, CODES).nll.sum(), hidden)[0])
    torch.testing.assert_close(*slopes)
