"""The formulas of GRPO on cases made by hand."""

import math

import pytest
import torch

from thinkclearly.training.policy_gradient import STEEPEST, combined_rewards, distance, group_advantages, surrogate

NAN = math.nan
LOW, HIGH = 0.2, 0.3


def advantages(rewards, groups=None, *options):
    groups = torch.zeros(len(rewards), dtype=torch.long) if groups is None else torch.tensor(groups)
    return group_advantages(torch.tensor(rewards), groups, *options).tolist()


# ---- rewards -----------------------------------------------------------------------------------------------------


def test_rewards_are_added_by_weight_and_those_that_do_not_apply_are_left_out():
    rewards = {"a": torch.tensor([1.0, NAN, 0.5, NAN]), "b": torch.tensor([0.0, 2.0, 4.0, NAN])}
    found = combined_rewards(rewards, {"a": 2.0, "b": 0.25})
    torch.testing.assert_close(found, torch.tensor([2.0, 0.5, 2.0, NAN]), equal_nan=True)


def test_a_reward_of_weight_zero_applies_and_says_nothing():
    assert combined_rewards({"a": torch.tensor([3.0])}, {"a": 0.0}).tolist() == [0.0]


# ---- advantages --------------------------------------------------------------------------------------------------


def test_advantages_are_standard_scores_within_each_group():
    found = advantages([1.0, 2.0, 3.0, 10.0, 30.0], [0, 0, 0, 1, 1])
    one, two = 1 / (1 + 1e-4), 10 / (math.sqrt(200) + 1e-4)
    assert found == pytest.approx([-one, 0.0, one, -two, two], rel=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1e4])
def test_equal_rewards_give_no_advantage(scale, value):
    # Of 0.1 and 0.7 in float32 the mean over 7 is not the value itself.
    assert advantages([value] * 7, None, scale, 1e-3) == [0.0] * 7


def test_a_reward_that_does_not_apply_gives_no_advantage_and_is_in_no_mean():
    assert advantages([1.0, NAN, 3.0]) == pytest.approx([-1 / (math.sqrt(2) + 1e-4), 0.0, 1 / (math.sqrt(2) + 1e-4)])
    assert advantages([NAN, NAN, NAN]) == [0.0] * 3


def test_what_is_compared_with_nothing_has_no_advantage():
    assert advantages([5.0]) == [0.0] and advantages([5.0, NAN]) == [0.0, 0.0]
    assert advantages([5.0, 1.0, 2.0], [0, 1, 2]) == [0.0] * 3
    assert advantages([5.0, 1.0, 2.0], [0, 1, 2], "none") == [0.0] * 3


def test_advantages_may_be_over_the_batchs_spread_or_over_none():
    rewards, groups = [1.0, 2.0, 3.0, 10.0, 30.0], [0, 0, 0, 1, 1]
    apart = [-1.0, 0.0, 1.0, -10.0, 10.0]
    assert advantages(rewards, groups, "none") == pytest.approx(apart)
    assert advantages(rewards, groups, "batch", 4.0) == pytest.approx([each / 4.0001 for each in apart])


def test_a_pairs_prompts_are_one_group_so_that_the_easier_one_has_the_higher_mean():
    rewards = [1.0, 1.0, 0.0, 0.0]
    assert advantages(rewards, [0, 0, 1, 1]) == [0.0] * 4
    assert [each > 0 for each in advantages(rewards)] == [True, True, False, False]


# ---- the distance ------------------------------------------------------------------------------------------------


def gap(*values):
    """Distance and its gradient by the policy's log-probability where log reference - log policy is `values`."""
    logps = torch.zeros(len(values), requires_grad=True)
    found = distance(logps, torch.tensor(values))
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    return found.tolist(), gradient.tolist()


def test_the_distance_is_nothing_where_both_agree_and_positive_elsewhere():
    assert gap(0.0) == ([0.0], [0.0])
    values, gradients = gap(-3.0, -0.1, 0.1, 3.0)
    assert all(value > 0 for value in values)
    assert [gradient > 0 for gradient in gradients] == [True, True, False, False], "towards the reference"


def test_the_distance_is_k3_up_to_the_steepest_place():
    places = [-20.0, -1.0, 0.5, 3.0, 9.9, STEEPEST]
    values, gradients = gap(*places)
    assert values == pytest.approx([math.exp(d) - d - 1 for d in places], rel=1e-5)
    assert gradients == pytest.approx([1 - math.exp(d) for d in places], rel=1e-5)


def test_the_distance_goes_on_as_a_straight_line_so_that_improbable_truth_does_not_blow_up():
    """Plain k3 has 1e7 at 16 nats and is infinite in float32 at 100; its gradient, too."""
    steepest = math.exp(STEEPEST)
    values, gradients = gap(16.0, 100.0, 1e4)
    assert values == pytest.approx([steepest * (1 + d - STEEPEST) - d - 1 for d in (16.0, 100.0, 1e4)], rel=1e-5)
    assert gradients == pytest.approx([1 - steepest] * 3, rel=1e-5)
    around, _ = gap(STEEPEST - 1e-3, STEEPEST, STEEPEST + 1e-3)
    assert around[2] - around[1] == pytest.approx(around[1] - around[0], rel=0.1), "no step"


# ---- the surrogate -----------------------------------------------------------------------------------------------


def learnt(ratio, advantage):
    """Loss, gradient by the log-probability, and whether it was clipped."""
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    found = surrogate(logps, torch.zeros(1, 1), torch.tensor([advantage]), LOW, HIGH)
    (gradient,) = torch.autograd.grad(found.loss.sum(), logps)
    return found.loss.item(), gradient.item(), found.clipped.item()


@pytest.mark.parametrize("advantage", [-2.0, 0.5])
def test_at_the_first_step_the_gradient_is_the_advantage(advantage):
    assert learnt(1.0, advantage) == pytest.approx((-advantage, -advantage, 0.0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.25, 1.0, False),  # above 1 + low, below 1 + high
        (1.4, 1.0, True),
        (0.7, 1.0, False),  # a good choice that has become unlikely is still learnt from
        (0.7, -1.0, True),
        (0.85, -1.0, False),
        (1.4, -1.0, False),  # a bad choice that has become likely as well
    ],
)
def test_what_has_gone_far_enough_is_not_learnt_from(ratio, advantage, clipped):
    loss, gradient, was_clipped = learnt(ratio, advantage)
    assert was_clipped == clipped
    if clipped:
        edge = 1 + HIGH if advantage > 0 else 1 - LOW
        assert (loss, gradient) == pytest.approx((-advantage * edge, 0.0))
    else:
        assert (loss, gradient) == pytest.approx((-advantage * ratio, -advantage * ratio))


def test_without_an_advantage_nothing_is_learnt_and_nothing_counts_as_clipped():
    for ratio in (0.1, 1.0, 10.0):
        assert learnt(ratio, 0.0) == (0.0, 0.0, 0.0)
