"""Log-probabilities of choices: teacher forcing gives what the decoder drew with, and what a formula gives by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from thinkclearly.data.pairs import shape_pairs
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.decoding.engine import guided_rows
from thinkclearly.decoding.policy import Policy, choice_logps, operating_point
from thinkclearly.decoding.settings import PREFERENCES, DecodeSettings
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.settings import EditSettings
from thinkclearly.models import cross_entropy
from thinkclearly.models.finetunes import TINY_CLEAR, load_base, load_clear_model
from thinkclearly.sequence import FULL, UNCOND
from thinkclearly.training.rollouts import Stopwatch, draw_samples, edit_samples

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
WATCH = Stopwatch(torch.device("cpu"))


@pytest.fixture(scope="module")
def base(golden):
    return load_base(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def tiny_clear():
    """The shipped fine-tune, whose gate has learnt what to copy."""
    return load_clear_model(TINY_CLEAR)


@pytest.fixture(scope="module")
def prompts():
    return shape_pairs(1, "train", size=96).to_list()


@pytest.fixture(scope="module")
def edits():
    """Photo pairs with instructions, as `edit_samples` takes them."""
    photos = packaged_photos("train")
    found = [random_edit(5, i, photos) for i in range(2)]
    return [
        {"key": str(i), "instruction": edit.instruction, "source": edit.render(64)[0]} for i, edit in enumerate(found)
    ]


def drawn(pair, prompts, count=2, **settings):
    """Samples of prompts, and how they were drawn."""
    settings = EditSettings(**settings)
    return draw_samples(*pair, prompts, settings, count, 7, lambda key: False, WATCH), settings


def edited(pair, edits, count=1, **settings):
    """Samples of edits with the gate drawn, too."""
    settings = EditSettings(**{"cfg_weight": 2.0, "cfg_weight2": 0.0, "sample_gate": True} | settings)
    return edit_samples(*pair, edits, settings, count, 7, WATCH), settings


def scored(pair, rollout, settings, scale=1.0, rows=None):
    """`Actions` of everything that was drawn, teacher-forced."""
    model, processor = pair
    rows = rows or guided_rows(settings, has_source=rollout.shown is not None)
    policy = Policy(settings, rows, scale, copies=settings.sample_gate)
    batch = rollout.model_inputs(torch.arange(len(rollout)), processor, rows)
    return model(**batch, score=policy)


def rows_of_logits(pair, rollout, rows):
    """Teacher-forced logits of each row: name → (S, N, K + I)."""
    batch = rollout.model_inputs(torch.arange(len(rollout)), pair[1], rows)
    return dict(zip(rows, pair[0].teacher_forced_logits(**batch).unflatten(0, (len(rollout), -1)).unbind(1)))


# ---- teacher forcing is what was drawn from ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"use_cfg": False}, {"cfg_weight": 1.0}, {"cfg_weight": 5.0}, {"cfg_weight": 3.0, "temperature": 0.7}],
    ids=["no guidance", "weight 1", "weight 5", "temperature"],
)
@torch.no_grad()
def test_drawings_have_the_log_probabilities_that_they_were_drawn_with(base, prompts, settings):
    rollout, settings = drawn(base, prompts, **settings)
    assert rollout.logps.isfinite().all() and (rollout.logps < 0).all()
    torch.testing.assert_close(scored(base, rollout, settings).logps, rollout.logps, **TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"prefer": "edit"}, {"clear_bias": 1.5}, {"cfg_weight2": 2.0}],
    ids=lambda settings: next(iter(settings), "as it is"),
)
@torch.no_grad()
def test_edits_have_the_log_probabilities_that_they_were_drawn_with(tiny_clear, edits, settings):
    rollout, settings = edited(tiny_clear, edits, **settings)
    copied = tiny_clear[0].vocabulary.is_instruction(rollout.class_ids)
    assert 0 < copied.sum() < copied.numel()
    found = scored(tiny_clear, rollout, settings)
    torch.testing.assert_close(found.logps, rollout.logps, **TOLERANCE)
    assert not found.entropy[copied].any() and (found.entropy[~copied] > 0).all()


@torch.no_grad()
def test_a_copied_patch_has_the_gates_log_probability_alone_and_a_painted_one_both(tiny_clear, edits):
    rollout, settings = edited(tiny_clear, edits)
    rows = rows_of_logits(tiny_clear, rollout, guided_rows(settings, has_source=True))
    codes = (2 * rows[FULL] - rows[UNCOND])[..., : tiny_clear[0].vocabulary.codebook_size].log_softmax(-1)
    gate = tiny_clear[0].gate(rows[FULL])
    copied = tiny_clear[0].vocabulary.is_instruction(rollout.class_ids)
    painted = codes.gather(-1, torch.where(copied, 0, rollout.class_ids)[..., None])[..., 0] + F.logsigmoid(-gate)
    torch.testing.assert_close(rollout.logps, torch.where(copied, F.logsigmoid(gate), painted), **TOLERANCE)


def test_as_many_patches_are_copied_as_the_gate_says(tiny_clear, edits, monkeypatch):
    """Whatever came before, a patch is copied with the gate's probability: the excess has mean 0."""
    monkeypatch.setattr(tiny_clear[0].clear_config, "gate_temperature", 20.0)  # less sure of itself than it is
    settings = EditSettings(cfg_weight=1.0, cfg_weight2=0.0, sample_gate=True)
    excess = variance = copied = count = 0.0
    sources, instructions = ([edit[name] for edit in edits] for name in ("source", "instruction"))
    for result in Editor(*tiny_clear, settings).edit_many(sources, instructions, num_images=8):
        chance = result.gate.sigmoid()
        chosen = tiny_clear[0].vocabulary.is_instruction(result.class_ids)
        excess += (chosen.float() - chance).sum().item()
        variance += (chance * (1 - chance)).sum().item()
        copied, count = copied + chosen.sum().item(), count + len(chance)
    assert variance > 100 and 0.2 < copied / count < 0.9
    assert abs(excess) < 3 * math.sqrt(variance)


def test_noise_of_the_device_is_that_of_the_cpu_on_a_cpu(base, prompts):
    one, two = (drawn(base, prompts, device_noise=value)[0] for value in (False, True))
    assert torch.equal(one.class_ids, two.class_ids) and torch.equal(one.logps, two.logps)


# ---- scales ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_originals_scale_is_guided_logits_over_their_weight(base, prompts):
    """FocusDiff's c − ((w − 1) / w)·u; the same as drawing at temperature w."""
    w = 5.0
    rollout, settings = drawn(base, prompts, cfg_weight=w)
    rows = rows_of_logits(base, rollout, (FULL, UNCOND))
    logps = (rows[FULL] - (w - 1) / w * rows[UNCOND]).log_softmax(-1)
    logps = logps.gather(-1, rollout.class_ids[..., None])[..., 0]
    torch.testing.assert_close(scored(base, rollout, settings, scale=w).logps, logps, **TOLERANCE)
    warmer = scored(base, rollout, replace(settings, temperature=w)).logps
    torch.testing.assert_close(warmer, logps, **TOLERANCE)


@torch.no_grad()
def test_without_the_row_that_tells_nothing_it_is_the_full_row_alone(base, prompts):
    rollout, settings = drawn(base, prompts, cfg_weight=5.0)
    logps = rows_of_logits(base, rollout, (FULL,))[FULL].log_softmax(-1)
    expected = logps.gather(-1, rollout.class_ids[..., None])[..., 0]
    torch.testing.assert_close(scored(base, rollout, settings, rows={FULL: 1.0}).logps, expected, **TOLERANCE)


# ---- by hand -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_entropy_is_that_of_the_distribution_that_is_drawn_from(base, prompts):
    rollout, settings = drawn(base, prompts, cfg_weight=3.0, temperature=0.7)
    rows = rows_of_logits(base, rollout, (FULL, UNCOND))
    codes = torch.distributions.Categorical(logits=(3 * rows[FULL] - 2 * rows[UNCOND]) / 0.7)
    found = scored(base, rollout, settings)
    torch.testing.assert_close(found.entropy, codes.entropy(), **TOLERANCE)
    torch.testing.assert_close(found.logps, codes.log_prob(rollout.class_ids), **TOLERANCE)


def test_choices_by_hand():
    codes = torch.tensor([[0.0, math.log(3.0)]]).expand(4, 2)
    drawn = torch.tensor([0, 1, 0, 1])
    copied = torch.tensor([False, False, True, True])
    odds = torch.full((4,), math.log(4.0))
    found = choice_logps(codes, drawn, copied, odds).exp().tolist()
    assert found == pytest.approx([0.25 * 0.2, 0.75 * 0.2, 0.8, 0.8])
    assert choice_logps(codes, drawn, copied, None).exp().tolist() == pytest.approx([0.25, 0.75, 1.0, 1.0])


def test_the_gate_is_moved_by_what_is_preferred_and_by_the_bias():
    gate = torch.tensor([0.0, 2.0])
    assert operating_point(gate, DecodeSettings()).tolist() == [0.0, 2.0]
    moved = operating_point(gate, DecodeSettings(prefer="edit", clear_bias=0.5))
    assert moved.tolist() == pytest.approx([0.5 - PREFERENCES["edit"], 2.5 - PREFERENCES["edit"]])


# ---- in chunks ---------------------------------------------------------------------------------------------------


def test_chunks_change_neither_values_nor_gradients(golden, prompts, monkeypatch):
    pair = load_base(str(golden / "checkpoint"))
    rollout, settings = drawn(pair, prompts, cfg_weight=3.0)
    parts = pair[0].token_model.parts()
    pair[0].requires_grad_(True)
    learning = [p for name in ("generation_head", "language_model") for p in parts[name].parameters()]
    found, heads = [], []
    logits = type(pair[0]).logits
    seen = lambda model, states: heads.append(2 * len(states)) or logits(model, states)  # noqa: E731
    monkeypatch.setattr(type(pair[0]), "logits", seen)
    for chunk in (10**6, 50):
        monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
        heads.clear()
        actions = scored(pair, rollout, settings)
        assert max(heads) <= chunk and (len(heads) == 1) is (chunk == 10**6)
        weights = torch.linspace(-1, 1, actions.logps.numel()).view_as(actions.logps)
        gradients = torch.autograd.grad((actions.logps * weights).sum(), learning, allow_unused=True)
        assert not actions.entropy.requires_grad
        found.append((actions.logps.detach(), actions.entropy, *(g for g in gradients if g is not None)))
    assert len(found[0]) > 10
    for one, two in zip(*found):
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
