"""GRPO computes what FocusDiff's own code does, from the prompt to the gradient."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN_ROOT
from safetensors.torch import load_file

from thinkclearly.decoding.policy import Policy
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.editing.settings import EditSettings
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.janus.deepseek import deepseek_key, to_native
from thinkclearly.models.load import load_checkpoint
from thinkclearly.sequence import FULL, UNCOND, drawing, named_rows
from thinkclearly.training.grpo import GrpoArguments
from thinkclearly.training.grpo_trainer import GrpoTrainer
from thinkclearly.training.options import RunArguments
from thinkclearly.training.policy_gradient import distance, group_advantages
from thinkclearly.training.rollouts import Rollout

ROOT = GOLDEN_ROOT / "focusdiff_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
SCENARIOS = ("pair", "pair_gt", "nonpair", "vanilla")
SCALES = ("exact", "div_w", "cond")
PARTS = ["language_model", "aligner", "generation_aligner", "generation_embeddings", "generation_head"]


@pytest.fixture(scope="module")
def values():
    return json.loads((ROOT / "values.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wanted():
    return load_file(ROOT / "expected.safetensors")


def load(reference=False):
    """The policy with the parts that the original trains, or its reference."""
    checkpoint = load_checkpoint(str(GOLDEN_ROOT / "janus_tiny" / "checkpoint"))
    model = InstructionModel(checkpoint.network, ClearConfig(checkpoint.token_model.codebook_size, instructions=[]))
    if reference:
        for key, tensor in load_file(ROOT / "reference_overrides.safetensors").items():
            for name, part in to_native(key, tensor).items():
                model.base.get_parameter(name).data.copy_(part)
    model.requires_grad_(False)
    for part in PARTS:
        model.token_model.parts()[part].requires_grad_(True)
    return model, checkpoint.processor


@pytest.fixture(scope="module")
def policy():
    return load()


@pytest.fixture(scope="module")
def reference():
    return load(reference=True)


def rows_of(scale, w):
    return {FULL: 1.0} if scale == "cond" else {FULL: w, UNCOND: 1 - w}


def rollout_of(values, wanted, scenario):
    words = values[f"{scenario}.rows"]
    ids = wanted[f"{scenario}.image_ids"].long()
    paired = scenario.startswith("pair")
    groups = torch.tensor([0 if paired else values[f"{scenario}.prompts"].index(text) for text in words])
    unknown = torch.full(ids.shape, math.nan)
    found = Rollout(words, groups, groups, ids, [None] * len(words), unknown, [""] * len(words), {})
    found.rewards = {"intern": wanted[f"{scenario}.rewards"].float()}
    found.advantages = wanted[f"{scenario}.advantages"].float()
    return found


def logps(pair, rollout, scale, w):
    model, processor = pair
    rows = rows_of(scale, w)
    score = Policy(DecodeSettings(), rows, scale=w if scale == "div_w" else 1.0)
    everything = torch.arange(len(rollout))
    return model(**rollout.model_inputs(everything, processor, rows), score=score).logps


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_prompts_and_their_empty_rows_are_the_originals(policy, values, wanted, scenario):
    processor = policy[1]
    found = processor.rows(
        [row for text in values[f"{scenario}.prompts"] for row in named_rows([drawing(text)], [FULL])]
    )
    assert torch.equal(found.input_ids, wanted[f"{scenario}.prompt_ids"].long())
    assert torch.equal(found.attention_mask, wanted[f"{scenario}.prompt_mask"].long())
    samples = [drawing(text) for text in values[f"{scenario}.rows"]]
    both = processor.rows(named_rows(samples, [FULL, UNCOND]))
    assert torch.equal(both.input_ids, wanted[f"{scenario}.text_ids"].long())
    length = both.input_ids.shape[1]
    assert torch.equal(both.attention_mask, wanted[f"{scenario}.attention_mask"][:, :length].long())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_log_probabilities_and_distances_are_the_originals(policy, reference, values, wanted, scenario, scale):
    w = values["settings"]["guidance_scale"]
    rollout = rollout_of(values, wanted, scenario)
    with torch.no_grad():
        found = {name: logps(pair, rollout, scale, w) for name, pair in (("policy", policy), ("reference", reference))}
    for name, each in found.items():
        torch.testing.assert_close(each, wanted[f"{scenario}.{name}.logps.{scale}"], **TOLERANCE)
    if scale != "cond":
        torch.testing.assert_close(distance(*found.values()), wanted[f"{scenario}.kl.{scale}"], **TOLERANCE)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_learnt_from_is_what_was_drawn_from(policy, values, wanted, scenario):
    """The original's sampling loop kept the log-probability of every token that it drew; `exact` gives the same."""
    rollout, drawn = rollout_of(values, wanted, scenario), wanted[f"{scenario}.rollout_tokens"].long()
    with torch.no_grad():
        found = logps(policy, rollout, "exact", values["settings"]["guidance_scale"])
    place = {tuple(ids): i for i, ids in enumerate(rollout.class_ids.tolist())}
    index = [place[tuple(ids)] for ids in drawn.tolist()]
    torch.testing.assert_close(found[index], wanted[f"{scenario}.rollout_logps"], **TOLERANCE)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_advantages_are_the_originals(values, wanted, scenario):
    rollout = rollout_of(values, wanted, scenario)
    found = group_advantages(rollout.rewards["intern"], rollout.groups)
    torch.testing.assert_close(found, rollout.advantages, **TOLERANCE)


def test_equal_rewards_give_no_advantage_where_the_original_has_rounding(values, wanted):
    count = values["settings"]["num_generations"]
    pair, nonpair = (wanted[f"constant_group_{name}.rewards"].float() for name in ("pair", "nonpair"))
    apart = torch.arange(len(nonpair)) // count
    torch.testing.assert_close(
        group_advantages(pair, torch.zeros_like(apart)), wanted["constant_group_pair.advantages"], **TOLERANCE
    )
    found, original = group_advantages(nonpair, apart), wanted["constant_group_nonpair.advantages"]
    assert not found[:count].any() and original[:count].abs().max() < 1e-3
    torch.testing.assert_close(found[count:], original[count:], **TOLERANCE)


def trainer_of(pair, tmp_path, values, **options):
    model, processor = pair
    model.zero_grad()
    settings = EditSettings(cfg_weight=values["settings"]["guidance_scale"])
    args = RunArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, eval_strategy="no")
    grpo = GrpoArguments(num_generations=values["settings"]["num_generations"], **options)
    return GrpoTrainer(
        model, processor=processor, grpo=grpo, settings=settings, rewards={"intern": None}, args=args, train_dataset=[]
    )


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("scale", ["exact", "div_w"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_losses_and_gradients_are_the_originals(
    tmp_path, policy, reference, values, wanted, scenario, scale, number, pieces
):
    beta = values["settings"]["betas"][number]
    kind = f"{scenario}.{scale}.beta_{beta}.set_epsilon_True"
    rollout = rollout_of(values, wanted, scenario)
    size = -(-len(rollout) // pieces)
    trainer = trainer_of(policy, tmp_path, values, beta=beta, logprob_scale=scale, rows_per_forward=size)
    # What the run began with: the stored reference.
    learning = [p for p in trainer.model.parameters() if p.requires_grad]
    other = [p for p in reference[0].parameters() if p.requires_grad]
    trainer.start = [p.detach().clone() for p in other]
    before = [p.detach().clone() for p in learning]
    loss = trainer.training_step(trainer.model, rollout, torch.tensor(len(rollout)))
    assert loss.item() == pytest.approx(values[f"{kind}.loss"], abs=1e-4, rel=1e-4)
    assert all(map(torch.equal, before, learning))  # the policy is back in its place
    norm = torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
    assert norm.item() == pytest.approx(values[f"{kind}.grad_norm"], rel=1e-3)
    gradients = {deepseek_key(name): p.grad for name, p in trainer.model.base.named_parameters() if p.grad is not None}
    prefix = f"{kind}.grad."
    for key in [key for key in wanted if key.startswith(prefix)]:
        name = key.removeprefix(prefix).removesuffix(".row_sums")
        found = gradients[name].sum(1) if key.endswith(".row_sums") else gradients[name]
        torch.testing.assert_close(found, wanted[key], atol=1e-4, rtol=1e-3)


def test_ground_truth_is_shown_as_often_as_the_original_shows_it(values):
    grpo = GrpoArguments()
    for step, chance in values["gt_probability"].items():
        assert np.interp(int(step), grpo.truth_steps, grpo.truth_shares) == pytest.approx(chance, abs=1e-9)


# The original's recipe and the defaults of its options: peak, warm-up, steps until the drop, and where it drops to.
SCHEDULES = {"recipe": (1e-5, 100, 300, 2e-6), "field_defaults": (5e-6, 45, 500, 1e-6)}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_learning_rate_falls_as_the_originals(tmp_path, policy, values, kind):
    name = next(name for name in values["lr_schedule"] if name.startswith(f"{kind}_total_"))
    total, (rate, warmup, drop, drop_to) = int(name.split("_total_")[1].split("_")[0]), SCHEDULES[kind]
    trainer = trainer_of(policy, tmp_path, values, lr_drop_steps=drop, lr_drop_to=drop_to, lr_end=2e-7)
    trainer.args.learning_rate, trainer.args.warmup_steps = rate, warmup
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = trainer.create_scheduler(total, optimizer)
    found = []
    for _ in range(total + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    for step, expected in values["lr_schedule"][name].items():
        if int(step) <= total:  # the original's goes on falling below its floor
            assert found[int(step)] == pytest.approx(expected, rel=1e-6, abs=1e-15)
