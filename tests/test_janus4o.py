"""Supervised training computes what Janus-4o's own script does, on that script's records."""

import json

import pytest
import torch
from conftest import GOLDEN_ROOT
from safetensors.torch import load_file
from transformers import get_scheduler

from thinkclearly.data.collator import Collator
from thinkclearly.images import Letterbox, load_image
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.cross_entropy import weighted_loss
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.janus.deepseek import deepseek_key
from thinkclearly.models.load import load_checkpoint
from thinkclearly.models.protocol import PromptBatch
from thinkclearly.sequence import Known, Row, named_row

ROOT = GOLDEN_ROOT / "janus4o_sft_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
RUNS = ("no_dropout", "dropout", "t2i_only")


@pytest.fixture(scope="module")
def values():
    return json.loads((ROOT / "values.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wanted():
    return load_file(ROOT / "expected.safetensors")


@pytest.fixture(scope="module")
def records(checkpoint):
    """The script's records as preparation would store them, words as they came."""
    rows = []
    for i, record in enumerate(json.loads((ROOT / "data.json").read_text(encoding="utf-8"))):
        inputs = [ROOT / name for name in record.get("input_image") or []]
        rows.append(
            {
                "key": str(i),
                "instruction": record["input_prompt"] if inputs else record["input_prompt"].strip(),
                "input_tokens": [code for path in inputs for code in codes_of(checkpoint, path)],
                "output_tokens": codes_of(checkpoint, ROOT / record["output_image"]),
                "sources": [{"path": str(path), "bytes": None} for path in inputs],
                "answer": None,
            }
        )
    return rows


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(str(GOLDEN_ROOT / "janus_tiny" / "checkpoint"))


def codes_of(checkpoint, path):
    picture = load_image(path)
    square = Letterbox(*picture.size, checkpoint.processor.image_size).fit(picture)
    return checkpoint.token_model.encode(checkpoint.processor.pixel_values([square]))[0].tolist()


def fresh():
    """A model whose weights may be changed."""
    checkpoint = load_checkpoint(str(GOLDEN_ROOT / "janus_tiny" / "checkpoint"))
    model = InstructionModel(checkpoint.network, ClearConfig(checkpoint.token_model.codebook_size, instructions=[]))
    tokenizer = checkpoint.token_model.parts()[checkpoint.token_model.tokenizer_part]
    for parameter in model.base.parameters():
        parameter.requires_grad_(True)
    tokenizer.requires_grad_(False)
    return model


class Recorded:
    """The conditions that the script's run withheld, in place of `Dropout`."""

    def __init__(self, values, run):
        self.filled, self.dropped = values[f"{run}.vq_slot_filled"], values[f"{run}.text_dropped"]

    def row(self, sample, key, epoch):
        if self.dropped[int(key)]:
            return named_row(sample, "uncond")
        known = [i for i, segment in enumerate(sample) if isinstance(segment, Known)]
        return Row(sample, frozenset(i for i, filled in zip(known, self.filled[int(key)]) if not filled))


def batch_of(checkpoint, records, values, run, legacy_shift=False):
    rows = [row for row in records if run != "t2i_only" or not row["input_tokens"]]
    rows = [{**row, "key": str(i)} for i, row in enumerate(rows)]
    vocabulary = InstructionVocabulary(checkpoint.token_model.codebook_size, ())
    collate = Collator(checkpoint.processor, vocabulary, Recorded(values, run), legacy_shift=legacy_shift)
    return collate(rows)


def loss_of(model, batch):
    counted = batch.pop("counted", None)
    weights = torch.ones_like(batch["labels"], dtype=torch.float32) if counted is None else counted.float()
    return weighted_loss(model(**batch).nll, weights)


@pytest.mark.parametrize("run", RUNS)
def test_ids_masks_and_slots_are_the_scripts(checkpoint, records, values, wanted, run):
    batch = batch_of(checkpoint, records, values, run)
    fed_back = checkpoint.processor.num_image_tokens - 1  # the script feeds the last code, too
    assert torch.equal(batch["input_ids"], wanted[f"{run}.input_ids"][:, : batch["input_ids"].shape[1]])
    assert batch["input_ids"].shape[1] == wanted[f"{run}.input_ids"].shape[1] - 1
    assert torch.equal(batch["attention_mask"], wanted[f"{run}.attention_mask"][:, :-1].long())
    assert torch.equal(batch["labels"], wanted[f"{run}.labels"])
    for row, slots in enumerate(values[f"{run}.slots"]):
        assert batch["drawn_slots"][row] == slots["target"][0] == batch["input_ids"].shape[1] - fed_back
        if not values[f"{run}.text_dropped"][row]:
            seen = [start for start, _ in slots["understanding_slots"]]
            assert [int(s) for s in batch["seen_slots"][row] if s >= 0] == seen
            known = zip(slots["vq_slots"], values[f"{run}.vq_slot_filled"][row])
            assert [int(s) for s in batch["known_slots"][row] if s >= 0] == [s for (s, _), filled in known if filled]


@pytest.mark.parametrize("run", RUNS)
def test_embeddings_logits_and_losses_are_the_scripts(checkpoint, records, values, wanted, run):
    batch, model = batch_of(checkpoint, records, values, run), fresh()
    prompt = PromptBatch(**{name: batch[name] for name in PromptBatch.__dataclass_fields__})
    family, codes = model.token_model, batch.get("source_tokens")
    features = None if codes is None else family.see(batch["pixel_values"])
    embeds = family.embed_prompt(prompt, features, codes)
    given = torch.arange(embeds.shape[1]) < prompt.drawn_slots[:, None]
    torch.testing.assert_close(embeds[given], wanted[f"{run}.inputs_embeds"][:, :-1][given], **TOLERANCE)
    logits = model.teacher_forced_logits(**batch)
    torch.testing.assert_close(logits, wanted[f"{run}.logits.full_positions"], **TOLERANCE)
    shifted = batch_of(checkpoint, records, values, run, legacy_shift=True)
    for name, each in (("full", batch), ("legacy_shift", shifted)):
        assert loss_of(model, each).item() == pytest.approx(values[f"{run}.loss.{name}"], abs=1e-4)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("shift", ("full", "legacy_shift"))
def test_gradients_are_the_scripts(checkpoint, records, values, wanted, run, shift):
    model = fresh()
    loss_of(model, batch_of(checkpoint, records, values, run, shift == "legacy_shift")).backward()
    parameters = [p for p in model.base.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    assert norm.item() == pytest.approx(values[f"{run}.{shift}.grad_norm"], rel=1e-4)
    gradients = {deepseek_key(name): p.grad for name, p in model.base.named_parameters() if p.grad is not None}
    kept = {key.removeprefix(prefix) for key in wanted if key.startswith(prefix := f"{run}.{shift}.grad.")}
    assert kept
    for key in kept:
        name = key.removesuffix(".row_sums")
        if name not in gradients:  # a tower without pictures, which we do not run: the script's gradients are zeros
            assert not wanted[prefix + key].any()
            continue
        found = gradients[name].sum(1) if key.endswith(".row_sums") else gradients[name]
        torch.testing.assert_close(found, wanted[prefix + key], **TOLERANCE)


def test_one_record_at_a_time_gives_the_scripts_losses(checkpoint, records, values, wanted):
    model = fresh()
    for i, record in enumerate(records):
        vocabulary = InstructionVocabulary(checkpoint.token_model.codebook_size, ())
        batch = Collator(checkpoint.processor, vocabulary)([record])
        assert torch.equal(batch["labels"], wanted[f"record_{i}.labels"])
        assert loss_of(model, batch).item() == pytest.approx(values[f"record_{i}.loss.full"], abs=1e-4)


def schedule(optimizer, warmup, total):
    options = {"num_warmup_steps": warmup, "num_training_steps": total}
    return get_scheduler("cosine_with_min_lr", optimizer, **options, scheduler_specific_kwargs={"min_lr_rate": 0.15})


def test_the_schedule_is_transformers_own_cosine_with_a_floor(values):
    for name, rates in values["lr_schedule"].items():
        total, warmup = (int(part) for part in name.split("_")[1::2])
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-6)
        scheduler = schedule(optimizer, warmup, total)
        found = {}
        for step in range(total + 1):
            found[step] = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
        for step, rate in rates.items():
            if int(step) <= total:  # the script's rises again afterwards, when nothing is trained any more
                assert found[int(step)] == pytest.approx(rate, rel=1e-6), (name, step)


def test_five_steps_train_as_the_script_does(checkpoint, records, values, wanted):
    model, recipe = fresh(), values["five_steps"]["arguments"]
    batch = batch_of(checkpoint, records, values, "no_dropout", legacy_shift=True)
    named = {name: p for name, p in model.base.named_parameters() if p.requires_grad}
    assert {deepseek_key(name) for name in named if "bias" not in name} <= set(values["weight_decay_groups"]["decay"])
    groups = [
        {"params": [p for name, p in named.items() if "bias" not in name], "weight_decay": recipe["weight_decay"]},
        {"params": [p for name, p in named.items() if "bias" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe["learning_rate"])
    steps = len(values["five_steps"]["losses"])
    scheduler = schedule(optimizer, int(recipe["warmup_rates"] * steps), steps)
    for loss, norm in zip(values["five_steps"]["losses"], values["five_steps"]["grad_norms"]):
        found = loss_of(model, dict(batch))
        found.backward()
        assert found.item() == pytest.approx(loss, abs=1e-3)
        total = torch.nn.utils.clip_grad_norm_(named.values(), recipe["max_grad_norm"])
        assert total.item() == pytest.approx(norm, rel=1e-3)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    trained = {deepseek_key(name): p for name, p in named.items()}
    for key in (key for key in wanted if key.startswith("five_steps.")):
        name = key.removeprefix("five_steps.").removesuffix(".row_sums")
        torch.testing.assert_close(trained[name].sum(1), wanted[key], atol=1e-3, rtol=1e-3)
