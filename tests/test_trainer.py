"""The objective is the reference's; runs that should be equal are; what is saved comes back, and nothing at random."""

import json
import logging
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from transformers import TrainerControl, TrainerState

from thinkclearly.config import ClearTrainingArguments
from thinkclearly.data.collator import EditCollator
from thinkclearly.decoding.guidance import gate_log_odds
from thinkclearly.models.backbone import codebook_hash, load_backbone
from thinkclearly.models.clear_head import ClearConfig, ClearEditModel
from thinkclearly.models.prompt import FULL, PART, UNCOND
from thinkclearly.training.adapters import add_lora, load_base, load_clear_model, train_fully
from thinkclearly.training.callbacks import CollapseAlarm, EpochOfDropout, SampleEdits, TuneClearWeight
from thinkclearly.training.trainer import ClearEditTrainer, GateMeter, weighted_loss

TOLERANCE = 1e-4
NAMES = ("square", "landscape", "portrait")
CODES, POSITIONS = 128, 36
INSTRUCTIONS = ("Make it blue.", "Remove the small green square from the table, please.", "Night.")


@pytest.fixture(scope="module")
def finetune(golden):
    return load_clear_model(golden / "finetune", base=golden / "checkpoint")


@pytest.fixture(scope="module")
def wanted(golden):
    return load_file(golden / "expected_finetune.safetensors")


def fresh(golden, seed=0, lora_dropout=0.0, **lora):
    """A model to train: LoRA and head are not at their neutral start, or half the gradients would be zero."""
    torch.manual_seed(seed)
    backbone = load_backbone(golden / "checkpoint")
    config = ClearConfig(CODES, clear_weight=0.3, codebook_hash=codebook_hash(backbone.model))
    model = add_lora(
        backbone, str(golden / "checkpoint"), config, r=4, lora_alpha=8, lora_dropout=lora_dropout, **lora
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "clear_head.weight":
                parameter.normal_(std=0.05)
    return model, backbone.processor


def records(golden, count, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        source, target = rng.integers(0, CODES, (2, POSITIONS))
        labels = np.where(rng.random(POSITIONS) < 0.5, CODES, target)
        row = {"key": f"record {i}", "instruction": INSTRUCTIONS[i % 3], "source": golden / "images/square.png"}
        rows.append(row | {"input_tokens": source.tolist(), "output_tokens": labels.tolist()})
    return rows


def make_trainer(pair, rows, output_dir, *, drop=(0.1, 0.5), clear_head_lr=None, callbacks=(), eval_rows=None, **args):
    model, processor = pair
    collator = EditCollator(processor, model.vocabulary, *drop, seed=3)
    defaults = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "learning_rate": 1e-3}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return ClearEditTrainer(
        model=model,
        processor=processor,
        clear_weight=0.3,
        clear_head_lr=clear_head_lr,
        data_collator=collator,
        args=ClearTrainingArguments(output_dir=str(output_dir), **(defaults | args)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        callbacks=[EpochOfDropout(collator), *callbacks],
    )


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def batch_of(pair, rows):
    return EditCollator(pair[1], pair[0].vocabulary)(rows)


def history(trainer, *names):
    return [[log.get(name, np.nan) for name in names] for log in trainer.state.log_history if "loss" in log]


# The objective


def test_weighted_loss_is_torch_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, CODES + 1, generator=generator)
    labels = torch.randint(CODES - 2, CODES + 1, (3, 5), generator=generator)
    weight = torch.ones(CODES + 1)
    weight[CODES] = 0.3
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)
    torch.testing.assert_close(weighted_loss(logits, labels, CODES, 0.3), expected)
    parts = [weighted_loss(logits[i], labels[i], CODES, 0.3, total=weight[labels].sum()) for i in range(3)]
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_loss_are_the_originals(golden, finetune, wanted, name):
    model, processor = finetune
    expected = load_file(golden / "expected.safetensors")
    instruction = json.loads((golden / "prompts.json").read_text(encoding="utf-8"))["instructions"][name]
    inputs = vars(processor.edit_rows([instruction], [FULL]))
    labels = torch.where(wanted[f"{name}.clear_labels"], CODES, wanted[f"{name}.target_tokens"])[None]
    inputs |= {
        "source_tokens": expected[f"{name}.image_tokens"][None],
        "pixel_values": expected[f"{name}.pixel_values"][None],
        "labels": labels,
    }
    with torch.no_grad():
        logits = model(**inputs)
        torch.testing.assert_close(logits[0], wanted[f"{name}.teacher_logits"], atol=TOLERANCE, rtol=TOLERANCE)
        # As the original trained: the picture slot keeps its placeholder embeddings.
        unfilled = model(**inputs | {"image_slot": torch.tensor([-1])})
    for kind, values in {"filled": logits, "original": unfilled}.items():
        for weight in (0.3, 1.0):
            found = weighted_loss(values, labels, CODES, weight)
            expected_loss = wanted[f"{name}.loss.{kind}.clear_weight_{weight}"]
            torch.testing.assert_close(found, expected_loss, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_clear_label_feeds_the_source_back(golden, finetune):
    rows = records(golden, 1)
    batch = batch_of(finetune, rows)
    same = dict(batch, labels=torch.where(batch["labels"] == CODES, batch["source_tokens"], batch["labels"]))
    with torch.no_grad():
        torch.testing.assert_close(finetune[0](**batch), finetune[0](**same))


@pytest.mark.parametrize("with_pictures", [True, False])
def test_a_left_padded_batch_gives_the_same_logits_as_one_by_one(golden, finetune, with_pictures):
    model, processor = finetune
    rows = records(golden, 3)
    prompt = processor.edit_rows([row["instruction"] for row in rows], [FULL, PART, UNCOND])
    assert not prompt.attention_mask.all(), "the prompts should differ in length"
    batch = {
        "source_tokens": torch.tensor([row["input_tokens"] for row in rows]),
        "labels": torch.tensor([row["output_tokens"] for row in rows]),
    }
    if with_pictures:
        batch["pixel_values"] = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model(**vars(prompt), **batch)
        for i, condition in enumerate((FULL, PART, UNCOND)):
            alone = vars(processor.edit_rows([rows[i]["instruction"]], [condition]))
            one = model(**alone, **{key: value[i : i + 1] for key, value in batch.items()})
            torch.testing.assert_close(together[i : i + 1], one, atol=1e-5, rtol=1e-5)


# Runs


def test_accumulation_and_batches_train_identically(golden, tmp_path):
    rows = records(golden, 6)  # the second step of four has two records only
    runs = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            fresh(golden),
            rows,
            tmp_path,
            num_train_epochs=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        runs.append((history(trainer, "loss", "grad_norm", "clear_rate_true"), trained(trainer.model)))
    assert len(runs[0][0]) == 4
    for values, weights in runs[1:]:
        np.testing.assert_allclose(values, runs[0][0], rtol=2e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], atol=2e-4, rtol=1e-3)


def test_only_lora_and_head_learn(golden, tmp_path):
    model, processor = pair = fresh(golden)
    names = set(trained(model))
    assert {"clear_head.weight", "clear_head.bias"} <= names
    assert all("lora_" in name or name.startswith("clear_head.") for name in names)
    adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert adapted
    assert not [
        name for name in adapted if any(part in name for part in ("vision_model", "vqmodel", "embed", "aligner"))
    ]
    assert any("generation_head.proj_out" in name for name in adapted)
    assert any("generation_head.vision_head" in name for name in adapted)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in names}
    before = trained(model)
    trainer = make_trainer(pair, records(golden, 4), tmp_path, max_steps=2, drop=(0.0, 0.0))
    trainer.train()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not [name for name in names if torch.equal(after[name], before[name])]


def test_logs_tell_how_the_gate_is_doing(golden, tmp_path):
    pair, rows = fresh(golden), records(golden, 4)
    trainer = make_trainer(
        pair, rows, tmp_path, eval_rows=rows[:3], max_steps=2, eval_strategy="steps", eval_steps=2, drop=(0.0, 0.0)
    )
    trainer.train()
    names = {"clear_rate_true", "clear_rate_predicted", "code_accuracy", "accuracy", "gate_auc"}
    first = next(log for log in trainer.state.log_history if "loss" in log)
    assert names | {"clear_weight", "grad_norm", "learning_rate"} <= set(first)
    evaluation = next(log for log in trainer.state.log_history if "eval_loss" in log)
    assert {f"eval_{name}" for name in names} <= set(evaluation)
    true = np.mean([np.array(row["output_tokens"]) == CODES for row in rows[:3]])
    assert evaluation["eval_clear_rate_true"] == pytest.approx(true)


def test_gate_meter_counts_rows_that_see_the_source():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, POSITIONS, CODES + 1, generator=generator)
    logits[..., CODES] += 2
    labels = torch.randint(0, CODES + 1, (4, POSITIONS), generator=generator)
    labels[:, ::2] = CODES
    logits[..., CODES] += (labels == CODES) * 1.0
    sees = torch.tensor([True, False, True, False])
    meter = GateMeter(CODES, torch.device("cpu"))
    meter.update(logits, labels, torch.zeros(4, dtype=torch.bool))
    assert meter.compute() == {}, "nothing seen, nothing said"
    meter.update(logits[:2], labels[:2], sees[:2])
    meter.update(logits[2:], labels[2:], sees[2:])
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


def test_evaluation_drops_nothing(golden, tmp_path):
    pair, rows = fresh(golden, lora_dropout=0.5), records(golden, 3)
    trainer = make_trainer(pair, rows, tmp_path, eval_rows=rows, drop=(1.0, 1.0), per_device_eval_batch_size=3)
    found = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    batch = batch_of(pair, rows)
    with torch.no_grad():
        expected = weighted_loss(pair[0].eval()(**batch), batch["labels"], CODES, 0.3).item()
    assert found == pytest.approx([expected, expected], rel=1e-5)
    trainer.clear_weight = 0.9  # a moving weight must not make evaluation losses incomparable
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_activation_checkpointing_changes_nothing(golden, tmp_path):
    runs = []
    for checkpointing in (False, True):
        pair = fresh(golden)
        trainer = make_trainer(pair, records(golden, 4), tmp_path, max_steps=2, activation_checkpointing=checkpointing)
        trainer.train()
        assert pair[0].base.is_activation_checkpointing is checkpointing
        runs.append(history(trainer, "loss", "grad_norm"))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)


@pytest.mark.slow
def test_compiled_training_is_plain_training(golden, tmp_path):
    runs = []
    # aot_eager: all of the compiler but the C++ that inductor would build for minutes.
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = make_trainer(fresh(golden), records(golden, 2), tmp_path, max_steps=2, **options)
        trainer.train()
        runs.append(history(trainer, "loss", "grad_norm"))
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-4)
    trainer.save_model()
    assert torch.equal(load_clear_model(tmp_path)[0].clear_head.weight, trainer.model.clear_head.weight)


def test_bf16_trains_close_to_float32(golden, tmp_path):
    runs = []
    for bf16 in (False, True):
        trainer = make_trainer(fresh(golden), records(golden, 4), tmp_path, max_steps=2, bf16=bf16)
        trainer.train()
        runs.append(history(trainer, "loss", "grad_norm"))
    np.testing.assert_allclose(runs[1], runs[0], rtol=0.05)
    assert runs[0] != runs[1]
    assert all(weight.dtype == torch.float32 for weight in trained(trainer.model).values())


def test_the_head_has_its_own_learning_rate(golden, tmp_path):
    pair = fresh(golden)
    trainer = make_trainer(
        pair,
        records(golden, 4),
        tmp_path,
        max_steps=4,
        clear_head_lr=0.5,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
    )
    trainer.train()
    assert [rate for (rate,) in history(trainer, "learning_rate")] == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    head = {id(p) for p in pair[0].clear_head.parameters()}
    groups = [{id(p) for p in group["params"]} for group in trainer.optimizer.param_groups]
    own = [i for i, group in enumerate(groups) if group & head]
    assert len(own) == 1 and groups[own[0]] == head
    assert trainer.lr_scheduler.base_lrs[own[0]] == 0.5
    everything = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(trained(pair[0]))
    trainer.create_optimizer()
    assert len(trainer.optimizer.param_groups) == len(groups), "asking again must not add the head again"


# Saving, loading, resuming


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_what_is_saved_comes_back(golden, tmp_path, options):
    pair = fresh(golden, **options)
    rows = records(golden, 2)
    trainer = make_trainer(pair, rows, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert {"adapter_config.json", "adapter_model.safetensors", "gen_head_clear.safetensors", "clear_config.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    again = load_clear_model(tmp_path)
    assert again[0].clear_config == pair[0].clear_config
    batch = batch_of(pair, rows)
    # Frozen, as the loaded one is: torch picks other kernels for weights that could need gradients.
    assert torch.equal(again[0](**batch), pair[0].eval().requires_grad_(False)(**batch))
    assert not any(p.requires_grad for p in again[0].parameters())
    assert again[1].edit_ids("Make it blue.") == pair[1].edit_ids("Make it blue.")


def test_full_fine_tuning_comes_back(golden, tmp_path):
    backbone = load_backbone(golden / "checkpoint")
    model = train_fully(backbone, ClearConfig(CODES))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make_trainer((model, backbone.processor), records(golden, 2), tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    learnt = ("janus.model.language_model.", "janus.model.generation_head.", "clear_head.")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if name.startswith(learnt)}
    batch = batch_of((model, backbone.processor), records(golden, 2))
    before = model.eval().requires_grad_(False)(**batch)
    assert torch.equal(load_clear_model(tmp_path)[0](**batch), before)
    model.base.model.generation_head.vision_head.weight.add_(1)
    trainer._load_from_checkpoint(str(tmp_path))
    assert torch.equal(model(**batch), before)


def test_a_resumed_run_ends_bit_identical(golden, tmp_path):
    rows = records(golden, 6)

    def run(folder, seed, resume=None):
        pair = fresh(golden, seed=seed, lora_dropout=0.1)
        trainer = make_trainer(
            pair,
            rows,
            folder,
            eval_rows=rows[:2],
            per_device_train_batch_size=2,  # three steps an epoch: the checkpoint is in the middle of the first
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            lr_scheduler_type="cosine",
            clear_head_lr=1e-2,
        )
        trainer.add_callback(TuneClearWeight(trainer, eta=0.5))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", seed=0)
    marker = tmp_path / "executed"
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Touch(marker)))
    resumed = run(tmp_path / "resumed", seed=7, resume=str(checkpoint))
    assert not marker.exists(), "a pickle of the checkpoint was executed"
    assert resumed.clear_weight == whole.clear_weight != 0.3
    expected = trained(whole.model)
    for name, weight in trained(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
    assert history(resumed, "loss", "grad_norm") == history(whole, "loss", "grad_norm")


class Touch:
    """A pickle that leaves a trace when it is read unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def saved(golden, tmp_path):
    pair = fresh(golden)
    directory = tmp_path / "saved"
    pair[0].save_pretrained(directory)
    return directory


def test_pickles_beside_the_weights_are_never_read(saved, tmp_path):
    marker = tmp_path / "executed"
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (saved / name).write_bytes(pickle.dumps(Touch(marker)))
    load_clear_model(saved)
    assert not marker.exists()


def test_a_missing_head_is_an_error(saved):
    (saved / "gen_head_clear.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="gen_head_clear.safetensors"):
        load_clear_model(saved)
    (saved / "clear_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no CLEAR head"):
        load_clear_model(saved)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, r"\(1, 32\).*\(1, 64\)"),
        ({"weight": torch.zeros(1, 64), "bias": torch.zeros(2)}, "another base"),
        ({"weight": torch.zeros(1, 64)}, "expected 'weight' and 'bias'"),
    ],
)
def test_a_head_of_another_shape_is_an_error(saved, tensors, message):
    save_file(tensors, saved / "gen_head_clear.safetensors")
    with pytest.raises(ValueError, match=message):
        load_clear_model(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("codebook_hash", "0123456789abcdef", "codebook 0123456789abcdef"),
        ("codebook_size", 64, "64 codes"),
        ("instructions", ["CLEAR", "WARP"], "WARP"),
        ("invented_later", 1, "invented_later"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error(saved, key, value, message):
    path = saved / "clear_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_clear_model(saved)


def test_an_adapter_of_another_base_is_an_error(golden, saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    layer = [name for name in tensors if ".layers.2." in name]
    assert layer

    save_file({name: t for name, t in tensors.items() if name not in layer}, path)
    with pytest.raises(ValueError, match="does not fit this base model.*layers.2"):
        load_clear_model(saved)  # PEFT itself would leave the layer at random

    save_file(tensors | {layer[0].replace(".layers.2.", ".layers.9."): tensors[layer[0]].clone()}, path)
    with pytest.raises(ValueError, match="layers.9"):
        load_clear_model(saved)

    wider = {name: torch.cat([t, t], -1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, path)
    with pytest.raises(ValueError, match="size mismatch.*base="):
        load_clear_model(saved)
    trainer = make_trainer(fresh(golden), records(golden, 1), saved)
    with pytest.raises(ValueError, match="size mismatch"):
        trainer._load_from_checkpoint(str(saved))


def test_an_adapter_must_name_a_base_that_exists(saved):
    path = saved / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model; pass it as base="):
        load_clear_model(saved)


def test_an_original_finetune_on_another_base_is_an_error(golden, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(golden / "checkpoint", other)
    weights = load_file(other / "model.safetensors")
    name = next(key for key in weights if key.startswith("gen_head.") and key.endswith("weight"))
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Load the base that the fine-tune was made from"):
        load_clear_model(golden / "finetune", base=other)


def test_a_name_that_is_no_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        load_clear_model(str(tmp_path / "nothing" / "here"))


def test_a_base_without_head_has_no_instructions(golden):
    model, _ = load_base(golden / "checkpoint")
    assert len(model.vocabulary) == 0
    assert model.logits(torch.zeros(1, 64)).shape == (1, CODES)


# Callbacks


@pytest.mark.parametrize(
    ("predicted", "start", "expected"),
    [(0.8, 0.5, 0.47), (0.2, 0.5, 0.53), (1.0, 0.12, 0.1), (0.0, 0.98, 1.0)],
)
def test_clear_weight_follows_the_excess(predicted, start, expected):
    class Holder:
        clear_weight = start

    callback = TuneClearWeight(Holder)
    metrics = {"eval_clear_rate_predicted": predicted, "eval_clear_rate_true": 0.5}
    callback.on_evaluate(None, TrainerState(), TrainerControl(), metrics=metrics)
    assert Holder.clear_weight == pytest.approx(expected)
    callback.on_evaluate(None, TrainerState(), TrainerControl(), metrics={"eval_loss": 1.0})
    assert Holder.clear_weight == pytest.approx(expected), "no rates, no move"


def test_collapse_stops_the_run(golden, tmp_path, caplog):
    class Perfect(ClearEditModel):
        """Sees its own targets."""

        def forward(self, labels, **inputs):
            return super().forward(labels=labels, **inputs) * 1e-6 + 100 * F.one_hot(labels, CODES + 1)

    model, processor = fresh(golden)
    trainer = make_trainer(
        (Perfect(model.janus, model.clear_config), processor),
        records(golden, 4),
        tmp_path,
        max_steps=4,
        callbacks=[CollapseAlarm()],
        drop=(0.0, 0.0),
    )
    with caplog.at_level(logging.ERROR, logger="thinkclearly"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert "collapsed" in caplog.text
    control = TrainerControl()
    CollapseAlarm().on_log(None, TrainerState(), control, logs={"loss": 0.3, "accuracy": 1.0})
    assert not control.should_training_stop


def test_sample_edits_are_saved_at_each_evaluation(golden, tmp_path):
    rows = records(golden, 2)
    trainer = make_trainer(
        fresh(golden),
        rows,
        tmp_path,
        eval_rows=rows,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[SampleEdits(lambda: Image.new("RGB", (8, 8)))],
    )
    trainer.train()
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["step_000001.png", "step_000002.png"]


def test_dropout_is_drawn_anew_each_epoch(golden, tmp_path):
    pair, rows = fresh(golden), records(golden, 8)
    trainer = make_trainer(pair, rows, tmp_path, num_train_epochs=2, per_device_train_batch_size=8, drop=(0.3, 0.5))
    collator, seen = trainer.data_collator, []
    original = collator.condition

    def condition(key):
        seen.append((int(collator.epoch), key, original(key)))
        return seen[-1][-1]

    collator.condition = condition
    trainer.train()
    epochs = [{key: value for number, key, value in seen if number == epoch} for epoch in (0, 1)]
    assert len(epochs[0]) == len(epochs[1]) == 8 and epochs[0] != epochs[1]
