"""Noise belongs to its sample, draws follow the distribution, and guidance is the formula it claims to be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkclearly.decoding.guidance import guidance_weights, guide
from thinkclearly.decoding.sampling import draw, gumbel_noise, warpers
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.instructions import gate_log_odds
from thinkclearly.sequence import FULL, NO_SOURCE, UNCOND


def test_noise_is_keyed_to_seed_and_sample():
    again = gumbel_noise((7, 3), 36, 129)
    assert torch.equal(gumbel_noise((7, 3), 36, 129), again)
    torch.manual_seed(123)
    assert torch.equal(gumbel_noise((7, 3), 36, 129), again), "the global generator has no part in it"
    others = [gumbel_noise((seed, sample), 36, 129) for seed, sample in ((7, 2), (8, 3), (3, 7), (0, 0))]
    assert all(not torch.equal(again, other) for other in others)
    state = torch.get_rng_state()
    gumbel_noise((1, 1), 4, 4)
    assert torch.equal(torch.get_rng_state(), state), "and is left alone"


def test_noise_is_finite_and_gumbel():
    noise = gumbel_noise((0, 0), 400, 1000)
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_max_draws_from_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    noise = gumbel_noise((5, 0), 40_000, 5)
    found = draw(logits.expand(40_000, -1), noise, warpers(temperature, 0, 1.0)).bincount(minlength=5) / 40_000
    torch.testing.assert_close(found, (logits / temperature).softmax(-1), atol=0.01, rtol=0)


def test_temperature_zero_is_greedy_whatever_the_filters():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, None, warpers(0, 3, 0.2)), logits.argmax(-1))
    assert len(warpers(0, 3, 0.2)) == 0


def test_top_k_draws_from_the_k_best():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(5000, -1)
    best = set(logits[0].topk(4).indices.tolist())
    found = draw(logits, gumbel_noise((1, 0), 5000, 30), warpers(1.0, 4, 1.0))
    assert set(found.tolist()) == best
    assert torch.equal(draw(logits, gumbel_noise((1, 0), 5000, 30), warpers(1.0, 1, 1.0)), logits.argmax(-1))


def test_top_p_draws_from_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, -1)
    found = draw(logits, gumbel_noise((1, 0), 5000, 4), warpers(1.0, 0, 0.7))
    assert set(found.tolist()) == {0, 1}
    share = (found == 0).float().mean().item()
    assert share == pytest.approx(0.5 / 0.8, abs=0.03)


@given(st.floats(-10, 10), st.floats(0, 10), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_guidance_weights_are_janus_4os_formula(w, w2, seed):
    full, part, uncond = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = {FULL: full, NO_SOURCE: part, UNCOND: uncond}
    weights = guidance_weights(w, w2)
    assert sum(weights.values()) == pytest.approx(1)
    expected = uncond + w * ((full + w2 * part) / (1 + w2) - uncond)
    torch.testing.assert_close(guide(rows, weights), expected)
    torch.testing.assert_close(guide(rows, guidance_weights(w)), uncond + w * (full - uncond))
    assert guidance_weights(1.0) == {FULL: 1.0} and torch.equal(guide(rows, guidance_weights(1.0)), full)


@given(st.floats(0.01, 5), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_gate_takes_the_class_weight_off_exactly(weight, instructions, seed):
    codes = 20
    p = torch.randn(6, codes + instructions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = p.softmax(-1)
    weights = torch.ones(codes + instructions, dtype=torch.float64)
    weights[codes:] = weight
    q = weights * p / (weights * p).sum(-1, keepdim=True)  # what weighted cross-entropy is minimised by
    copy = p[:, codes:].sum(-1)
    torch.testing.assert_close(gate_log_odds(q.log(), codes, weight), (copy / (1 - copy)).log())
    # Logits need no normalisation.
    torch.testing.assert_close(gate_log_odds(q.log() + 3, codes, weight), (copy / (1 - copy)).log())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"top_k": -1},
        {"guidance": "both"},
        {"cfg_weight2": -1.0},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        DecodeSettings(**wrong)
