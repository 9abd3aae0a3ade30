"""`method: grpo` learns the same from the same samples, however they are cut up, and whatever happens meanwhile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from real_runs import results, run_and_kill
from safetensors.torch import load_file
from tiny_runs import trained
from transformers import TrainerCallback

from thinkclearly import cli, load_editor
from thinkclearly.data.pairs import PROMPTS, shape_pairs
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.editing.settings import EditSettings
from thinkclearly.models.finetunes import TINY_CLEAR, load_clear_model
from thinkclearly.models.instruction_head import ClearConfig
from thinkclearly.models.load import load_checkpoint
from thinkclearly.training.adapters import add_lora
from thinkclearly.training.grpo import GrpoArguments
from thinkclearly.training.grpo_trainer import GrpoTrainer
from thinkclearly.training.options import RunArguments
from thinkclearly.training.policy_gradient import combined_rewards
from thinkclearly.training.rewards import shape_edits

ROOT = Path(__file__).parents[1]
CODES, SIDE = 128, 96
SINGLES = ("A dog.", "Two cats on a red carpet.", "A house by the sea.")
NUMBERS = ("loss", "grad_norm", "reward", "reward_std", "kl", "entropy", "clip_ratio")


def warmth(prompts, completions, **columns):
    """How much more red than blue, in [-1, 1]."""
    return [float((np.asarray(c, float) / 255).mean((0, 1)) @ [1, 0, -1]) for c in completions]


@pytest.fixture(scope="module")
def rows():
    """Two pairs with pictures, three prompts alone."""
    pairs = shape_pairs(2, "train", size=SIDE).to_list()
    alone = [{"key": words, "prompts": [words], "images": [], "scene": []} for words in SINGLES]
    mixed = [pairs[0], alone[0], alone[1], pairs[1], alone[2]]
    return datasets.Dataset.from_list(mixed, features=PROMPTS)


def fresh(golden, dropout=0.0):
    """A model to train, without instruction tokens; its LoRA is not at its neutral start."""
    torch.manual_seed(0)
    checkpoint = load_checkpoint(golden / "checkpoint")
    config = ClearConfig(CODES, instructions=[], codebook_hash=checkpoint.token_model.codebook_fingerprint())
    model = add_lora(checkpoint, str(golden / "checkpoint"), config, r=4, lora_alpha=8, lora_dropout=dropout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model, checkpoint.processor


class Gradients(TrainerCallback):
    """Keeps those of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make_trainer(
    pair, rows, folder, *, rewards=None, eval_rows=None, callbacks=(), cfg_weight=2.0, args=(), **options
):
    model, processor = pair
    defaults = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "learning_rate": 1e-3}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "method": "grpo"}
    choices = {"num_generations": 3, "truth_steps": [], "truth_shares": [], "sample_sheets": False}
    return GrpoTrainer(
        model=model,
        processor=processor,
        grpo=GrpoArguments(**(choices | options)),
        settings=EditSettings(cfg_weight=cfg_weight, cfg_weight2=0.0),
        rewards=rewards or {"warmth": warmth},
        args=RunArguments(output_dir=str(folder), **(defaults | dict(args))),
        train_dataset=rows,
        eval_dataset=eval_rows,
        callbacks=list(callbacks),
    )


def logs(trainer, *names):
    return [[log.get(name, np.nan) for name in names] for log in trainer.state.log_history if "loss" in log]


def assert_close(found, expected, rtol):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], atol=1e-6, rtol=rtol, msg=name)


# ---- a step ------------------------------------------------------------------------------------------------------


def test_a_step_makes_better_samples_likelier_and_says_what_it_did(golden, rows, tmp_path):
    rewards = {"warmth": warmth, "pairs": lambda scene, **_: [None if text is None else 0.5 for text in scene]}
    trainer = make_trainer(
        fresh(golden),
        rows,
        tmp_path,
        rewards=rewards,
        reward_funcs=list(rewards),
        reward_weights=[2.0, 1.0],
        args={"max_steps": 1, **BATCH},
    )
    trainer.train()
    (rollout,), log = trainer.rollouts, trainer.state.log_history[0]
    assert len(rollout) == 3 * 7
    alone = torch.tensor([text is None for text in rollout.columns["scene"]])
    assert rollout.rewards["pairs"].isnan().tolist() == alone.tolist() and alone.sum() == 9
    combined = 2 * rollout.rewards["warmth"] + torch.where(alone, 0, 0.5)
    torch.testing.assert_close(combined_rewards(rollout.rewards, trainer.weights), combined)
    assert log["reward"] == pytest.approx(combined.mean().item(), rel=1e-5)
    assert log["rewards/warmth"] == pytest.approx(rollout.rewards["warmth"].mean().item(), rel=1e-5)
    assert log["rewards/pairs"] == 0.5 and log["rewards/pairs_std"] == 0
    spreads = [combined[rollout.groups == group].std().item() for group in rollout.groups.unique()]
    assert log["reward_std"] == pytest.approx(np.mean(spreads), rel=1e-5) and len(spreads) == 5
    assert log["kl"] == 0 and log["clip_ratio"] == 0 and log["truth_share"] == 0
    assert 0 < log["entropy"] < np.log(CODES) and 0 <= log["logp_difference"] < 1e-4
    assert log["grad_norm"] > 0
    stages = ("rollout", "pictures", "reward", "reference", "forward", "backward")
    assert all(log[f"seconds/{stage}"] > 0 for stage in stages)
    everything = torch.arange(len(rollout))
    batch = rollout.model_inputs(everything, trainer.processor, trainer.policy.rows)
    with torch.no_grad():
        rise = trainer.model.eval()(**batch, score=trainer.policy).logps - rollout.logps
    assert (rise.sum(1) * rollout.advantages).sum() > 0.1


BATCH, THREE = ({"per_device_train_batch_size": size} for size in (5, 3))


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_gradients_are_the_same_however_many_samples_one_pass_has(golden, rows, tmp_path, size):
    found = []
    for rows_per_forward in (0, size):
        kept = Gradients()
        trainer = make_trainer(
            fresh(golden),
            rows.select(range(3)),
            tmp_path,
            rows_per_forward=rows_per_forward,
            callbacks=[kept],
            args={"max_steps": 2, **THREE},
        )
        trainer.train()
        found.append((kept.steps, logs(trainer, *NUMBERS)))
    assert len(found[0][0]) == 2
    assert_close(found[1][0], found[0][0], rtol=2e-3)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def edits():
    """Photo pairs with what judges them, one of them twice as wide as it is high."""
    photos, found = packaged_photos("train"), []
    for i, size in enumerate([(64, 64), (96, 48)]):
        edit = random_edit(5, i, photos)
        source, target, mask = edit.render(*size)
        found.append(
            {
                "key": f"edit {i}",
                "instruction": edit.instruction,
                "source": source,
                "target": target,
                "mask": mask,
                "edit": edit.to_json(),
            }
        )
    return found


def test_edits_and_their_gate_learn_the_same_however_many_samples_one_pass_has(edits, tmp_path):
    found = []
    for size in (0, 3):
        model, processor = load_clear_model(TINY_CLEAR)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("clear_head."))
        kept = Gradients()
        trainer = make_trainer(
            (model, processor),
            edits,
            tmp_path,
            rewards={"shape_edits": shape_edits},
            callbacks=[kept],
            task="edit",
            rows_per_forward=size,
            num_generations=2,
            args={"max_steps": 1, "per_device_train_batch_size": 2},
        )
        trainer.train()
        found.append((kept.steps, logs(trainer, *NUMBERS)))
    assert found[0][0][0]["clear_head.weight"].abs().max() > 0
    assert_close(found[1][0], found[0][0], rtol=2e-3)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def test_only_the_last_pass_of_a_step_is_said_to_end_it(golden, rows, tmp_path, monkeypatch):
    """DDP exchanges gradients then, and DeepSpeed takes its step."""
    said, real = [], Accelerator.backward

    def backward(accelerator, loss, **kwargs):
        said.append(accelerator.sync_gradients)
        real(accelerator, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", backward)
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    make_trainer(fresh(golden), rows.select([0, 3]), tmp_path, rows_per_forward=2, args=args).train()
    assert said == [False] * 5 + [True], "two pairs of 3 samples a prompt, two samples a pass"


def test_accumulated_batches_learn_as_one_batch(golden, rows, tmp_path):
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        kept = Gradients()
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        options = {"truth_steps": [0], "truth_shares": [0.5], "scale_rewards": "batch"}
        trainer = make_trainer(fresh(golden), rows.select(range(4)), tmp_path, callbacks=[kept], args=args, **options)
        trainer.train()
        found.append((kept.steps, logs(trainer, *NUMBERS, "truth_share")))
    assert_close(found[1][0], found[0][0], rtol=2e-3)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def test_equal_rewards_move_nothing(golden, rows, tmp_path):
    pair = fresh(golden)
    before = trained(pair[0])
    trainer = make_trainer(
        pair,
        rows,
        tmp_path,
        rewards={"same": lambda prompts, **_: [0.7] * len(prompts)},
        args={"max_steps": 2, "weight_decay": 0.0, **BATCH},
    )
    trainer.train()
    assert logs(trainer, "loss", "grad_norm", "equal_rewards", "reward_std") == [[0, 0, 1, 0]] * 2
    for name, weight in trained(trainer.model).items():
        assert torch.equal(weight, before[name]), name


# ---- the reference -----------------------------------------------------------------------------------------------


def test_without_beta_no_reference_is_computed_or_kept(golden, rows, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("the reference is not needed")

    monkeypatch.setattr(GrpoTrainer, "reference", refuse)
    trainer = make_trainer(fresh(golden), rows, tmp_path, beta=0.0, args={"max_steps": 1, **BATCH})
    trainer.train()
    log = trainer.state.log_history[0]
    assert trainer.start == [] and "kl" not in log and "seconds/reference" not in log


def test_the_reference_is_what_training_began_with(golden, rows, tmp_path):
    pair = fresh(golden)
    before = trained(pair[0])
    trainer = make_trainer(pair, rows, tmp_path, args={"max_steps": 2, **BATCH})
    trainer.train()
    (first,), (second,) = logs(trainer, "kl")
    assert first == 0 and second > 1e-6
    after = trained(trainer.model)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    with trainer.reference(trainer.model):
        for name, weight in trained(trainer.model).items():
            assert torch.equal(weight, before[name]), name
    for name, weight in trained(trainer.model).items():
        assert torch.equal(weight, after[name]), name


# ---- several steps on the same samples, and interrupted runs -----------------------------------------------------


def test_samples_are_learnt_from_several_times(golden, rows, tmp_path):
    seen = []

    def counted(prompts, completions, **columns):
        seen.append(prompts)
        return warmth(prompts, completions)

    kept = Gradients()
    options = {"num_iterations": 2, "epsilon": 0.01, "epsilon_high": 0.02, "beta": 0.0}
    trainer = make_trainer(
        fresh(golden),
        rows,
        tmp_path,
        rewards={"warmth": counted},
        callbacks=[kept],
        **options,
        args={"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
    )
    trainer.train()
    assert len(seen) == 2 and seen[0] != seen[1], "drawn for two steps each"
    clipped = [log["clip_ratio"] for log in trainer.state.log_history if "clip_ratio" in log]
    assert clipped[0] == clipped[2] == 0 and clipped[1] > 0.05 and clipped[3] > 0.05
    rewards = [log.get("reward") for log in trainer.state.log_history if "loss" in log]
    assert rewards[0] is not None and rewards[1] is rewards[3] is None, "logged when they are drawn"
    assert any(not torch.equal(kept.steps[1][name], gradient) for name, gradient in kept.steps[0].items())


def test_records_come_block_by_block_and_every_epoch_in_another_order(golden, rows, tmp_path):
    trainer = make_trainer(fresh(golden), rows, tmp_path, num_iterations=3, args={"per_device_train_batch_size": 2})
    sampler, orders = trainer._get_train_sampler(), []
    for epoch in (0, 1, 2):
        trainer.state.epoch = float(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == 12
        for block in (order[:6], order[6:]):
            assert block == block[:2] * 3
        assert len(set(order)) == 4
        orders.append(order)
    assert orders[0] != orders[1] and len(trainer.get_train_dataloader()) == 6
    with pytest.raises(ValueError, match="5 records are fewer than the 8 of one optimizer step; add records"):
        make_trainer(
            fresh(golden), rows, tmp_path, num_iterations=2, args={"per_device_train_batch_size": 8}
        )._get_train_sampler()


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_run_resumes_bit_identically_from_any_step(golden, rows, tmp_path, iterations):
    """Dropout, ground truth and a reference among what has to go on; with two iterations in the middle of samples."""
    options = {"num_iterations": iterations, "truth_steps": [0, 5], "truth_shares": [1.0, 0.0]}
    args = {"per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    args |= {"save_total_limit": None}

    def run(checkpoint=None):
        folder = tmp_path / (checkpoint or "whole")
        trainer = make_trainer(fresh(golden, dropout=0.1), rows, folder, args=args, **options)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / "whole" / checkpoint))
        return trainer

    whole = run()
    start, end = trained(fresh(golden)[0]), trained(whole.model)
    for step in (1, 2) if iterations == 1 else (1, 3):
        resumed = run(f"checkpoint-{step}")
        for name, weight in trained(resumed.model).items():
            assert torch.equal(weight, end[name]), (step, name)
        assert all(map(torch.equal, resumed.start, start.values())), "the reference is that of the first step"
        found, expected = (logs(trainer, *NUMBERS, "rewards/warmth")[step:] for trainer in (resumed, whole))
        np.testing.assert_array_equal(found, expected)


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(golden, rows, tmp_path):
    args = {"max_steps": 4, "learning_rate": 1e30, "max_grad_norm": 0.0, **BATCH}
    trainer = make_trainer(fresh(golden), rows, tmp_path, args=args)
    with pytest.raises(ValueError, match="Step 1: the loss is nan. Training stops.*Lower learning_rate"):
        trainer.train()


# ---- evaluation, settings ----------------------------------------------------------------------------------------


def test_evaluation_is_the_same_for_any_batch_size(golden, rows, tmp_path):
    pair, found = fresh(golden), []
    for size in (1, 2, 5):
        trainer = make_trainer(pair, rows, tmp_path, eval_rows=rows, args={"per_device_eval_batch_size": size})
        found.append(trainer.evaluate())
    assert {"eval_reward", "eval_rewards/warmth"} <= found[0].keys()
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.9}])
def test_what_is_not_drawn_from_the_whole_distribution_is_not_learnt_from(golden, tmp_path, settings):
    model, processor = fresh(golden)
    with pytest.raises(ValueError, match="whole distribution.*temperature above 0, top_k=0 and top_p=1"):
        GrpoTrainer(
            model,
            processor=processor,
            grpo=GrpoArguments(),
            settings=EditSettings(**settings),
            rewards={},
            args=RunArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="no"),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations=1; expected 2 or more"),
        ({"task": "paint"}, "task='paint'; choose from draw, edit"),
        ({"epsilon": -0.1}, "epsilon=-0.1; expected 0 or more"),
        ({"beta": float("nan")}, "beta=nan; expected 0 or more"),
        ({"reward_weights": [1.0, 2.0]}, "1 rewards and 2 reward_weights; give one for each"),
        ({"truth_steps": [5, 1, 9]}, "as many shares as steps, the steps rising"),
        ({"truth_steps": [1]}, "as many shares as steps, the steps rising"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GrpoArguments(**options)


def test_what_is_not_named_is_judged_by_the_built_in_shapes():
    assert GrpoArguments().reward_funcs == ["shapes"]
    assert GrpoArguments(task="edit").reward_funcs == ["shape_edits"]
    assert GrpoArguments(own_rewards=["mine:first"]).reward_funcs == []


# ---- the command -------------------------------------------------------------------------------------------------


def flags(options):
    found = []
    for name, value in options.items():
        found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


@pytest.fixture(scope="module")
def settings(golden, tmp_path_factory):
    """A recipe on the reference base: pairs of a file, the first two with pictures, and single prompts of another."""
    folder, records = tmp_path_factory.mktemp("data"), []
    for i, row in enumerate(shape_pairs(5, "train", size=SIDE).to_list()):
        record = dict(zip(("prompt1", "prompt2"), row["prompts"]))
        for number, picture in enumerate(row["images"] if i < 4 else (), 1):
            (folder / f"{i}-{number}.png").write_bytes(picture["bytes"])
            record[f"image{number}"] = f"{i}-{number}.png"
        records.append(record)
    (folder / "pairs.json").write_text(json.dumps(records))
    (folder / "prompts.txt").write_text("\n".join([*SINGLES, "A bridge.", "A hat.", "Rain.", "A red hat."]))
    (folder / "warm_rewards.py").write_text("from test_grpo import warmth\n")
    options = {"method": "grpo", "base_model": golden / "checkpoint", "source": "pairs", "path": folder / "pairs.json"}
    options |= {"prompts_path": folder / "prompts.txt", "eval_samples": 3, "lora_r": 4, "lora_dropout": 0.0}
    options |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "max_steps": 2, "save_steps": 2}
    options |= {"logging_steps": 1, "eval_steps": 2, "learning_rate": 1e-3, "cfg_weight": 2.0, "num_generations": 3}
    options |= {"own_rewards": ["warm_rewards:warmth"], "truth_steps": [0], "truth_shares": [0.5]}
    return options | {"use_cpu": "true", "temperature": 1.0}


@pytest.fixture
def with_rewards(settings, monkeypatch):
    """What the command line's function of one's own is imported from."""
    folder = str(Path(settings["path"]).parent)
    monkeypatch.syspath_prepend(folder)
    paths = [folder, str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | environment | {"CUDA_VISIBLE_DEVICES": ""}


def history(folder, *names):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [[log.get(name, np.nan) for name in names] for log in state["log_history"] if "loss" in log]


def launch(config, environment, options, script=ROOT / "scripts" / "train.py"):
    """The real script in two processes."""
    command = [Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "2"]
    command += ["--main_process_port", "0", "--config_file", ROOT / "recipes" / "accelerate" / f"{config}.yaml"]
    command = list(map(str, [*command, script, *flags(options)]))
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_killed_between_steps_on_the_same_samples_ends_bit_identical(
    settings, with_rewards, one_thread, tmp_path
):
    changed = {"lora_dropout": 0.1, "num_iterations": 2, "max_steps": 5, "save_steps": 3, "eval_steps": 5}
    options, whole, killed = settings | changed, tmp_path / "whole", tmp_path / "killed"
    cli.main(["train", *flags(options | {"output_dir": whole})])
    argv = ["train", *flags(options | {"output_dir": killed})]
    run_and_kill(argv, 4, with_rewards)
    assert (killed / "checkpoint-3" / "samples_0.safetensors").is_file()
    assert not (killed / "adapter_model.safetensors").exists()
    cli.main(argv)
    assert load_file(killed / "adapter_model.safetensors")
    for name in ("adapter_model.safetensors", "clear_config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert results(killed)["eval_reward"] == results(whole)["eval_reward"]


def test_two_processes_learn_and_evaluate_as_one(settings, with_rewards, tmp_path):
    """They have prompts of other numbers, and so other numbers of passes."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = settings | {"scale_rewards": "batch", "rows_per_forward": 5, "truth_shares": [1.0]}
    cli.main(["train", *flags(options | {"output_dir": one})])
    options["per_device_train_batch_size"] = 2
    process = launch("ddp", with_rewards, options | {"output_dir": two})
    assert process.returncode == 0, process.stderr[-4000:]
    names = (*NUMBERS, "rewards/warm_rewards:warmth", "truth_share", "equal_rewards")
    # The loss is what is left of a sum of advantages.
    np.testing.assert_allclose(history(two, *names), history(one, *names), rtol=1e-4, atol=1e-5)
    assert 0 < max(history(one, "truth_share"))[0] < 1
    for name in ("eval_reward", "eval_rewards/warm_rewards:warmth"):
        assert results(two)[name] == pytest.approx(results(one)[name], rel=1e-4), name
    sheets = sorted(path.name for path in (two / "samples").glob("*.png"))
    assert sheets == [f"step_{step:06d}.png" for step in (1, 2)]
    with Image.open(two / "samples" / sheets[0]) as picture:
        assert picture.width > 3 * SIDE and picture.height > 2 * SIDE


@pytest.mark.parametrize(
    "rank", [pytest.param(0, id="all weights"), pytest.param(4, id="LoRA", marks=pytest.mark.slow)]
)
def test_fsdp2_gathers_weights_to_draw_and_learns_and_resumes_as_one_process(settings, with_rewards, tmp_path, rank):
    """The reference is swapped in slices, also after a resumption between steps on the same samples."""
    options = settings | {"lora_r": rank, "truth_shares": [1.0], "num_iterations": 2, "save_steps": 3, "eval_steps": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    cli.main(["train", *flags(options | {"output_dir": one, "max_steps": 4})])
    script = tmp_path / "twice.py"
    script.write_text(
        "import sys\nfrom thinkclearly import cli\n"
        "for steps in ('3', '4'):\n    cli.start('train', [*sys.argv[1:], '--max_steps', steps])\n"
    )
    process = launch("fsdp2", with_rewards, options | {"output_dir": two, "per_device_train_batch_size": 2}, script)
    assert process.returncode == 0 and "Going on from" in process.stderr, process.stderr[-4000:]
    assert (two / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file(), "was it FSDP?"
    found, expected = (np.array(history(folder, *NUMBERS)) for folder in (two, one))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert expected[3, NUMBERS.index("kl")] > 0
    assert results(two)["eval_reward"] == pytest.approx(results(one)["eval_reward"], rel=1e-3)


def test_passes_of_some_rows_are_refused_where_processes_would_wait_for_each_other(
    golden, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(GrpoTrainer, "weights_are_sharded", True)
    with pytest.raises(ValueError, match="use FSDP2, DDP or ZeRO-2"):
        make_trainer(fresh(golden), rows, tmp_path)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ValueError, match="rows_per_forward under FSDP2.*give 0"):
        make_trainer(fresh(golden), rows, tmp_path, rows_per_forward=2)


def test_a_judge_of_the_built_in_shapes_is_refused_for_other_pictures(settings, tmp_path, caplog):
    options = {name: value for name, value in settings.items() if name != "own_rewards"}
    with pytest.raises(SystemExit):
        cli.main(["train", *flags(options | {"output_dir": tmp_path})])
    assert "reward shapes judges the built-in shapes alone, not source: pairs; give reward_funcs" in caplog.text


def test_a_fine_tune_goes_on_from_rewards_of_its_edits(tmp_path):
    options = {"method": "grpo", "task": "edit", "adapter": TINY_CLEAR}
    options |= {"limit": 4, "eval_samples": 2, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
    options |= {"num_generations": 2, "temperature": 1.0, "cfg_weight": 1.0, "learning_rate": 1e-5}
    options |= {"output_dir": tmp_path, "use_cpu": "true", "save_strategy": "no", "eval_steps": 2}
    cli.main(["train", *flags(options)])
    ((first, second),) = [[log[0] for log in history(tmp_path, "rewards/shape_edits")]]
    assert 0 < first < 1 and 0 < second < 1
    assert all(0 <= value < 1e-4 for (value,) in history(tmp_path, "logp_difference")), "the gate is scored as drawn"
    before, after = (load_file(Path(path) / "gen_head_clear.safetensors") for path in (TINY_CLEAR, tmp_path))
    assert not torch.equal(before["weight"], after["weight"]), "the gate has learnt, too"
    edit = random_edit(9, 1, packaged_photos("train"))  # of a figure; where the background changes nothing is copied
    result = load_editor(tmp_path).edit(edit.render(64)[0], edit.instruction, temperature=0.0)
    assert 0.5 < result.clear_fraction < 1 and result.image.size == (64, 64)
