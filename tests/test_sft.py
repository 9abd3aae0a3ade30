"""`method: sft` trains pictures from words, edits of one and two pictures, and answers together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from real_runs import results, run_and_kill
from safetensors.torch import load_file
from tiny_runs import history, trained

from thinkclearly import cli, load_model
from thinkclearly.data.collator import Collator
from thinkclearly.data.prepare import prepare_samples, with_source_codes
from thinkclearly.data.samples import sharegpt4o_samples
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.hub.publish import staged
from thinkclearly.images import patch_difference
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.instruction_head import ClearConfig
from thinkclearly.models.load import load_checkpoint
from thinkclearly.models.protocol import PromptBatch
from thinkclearly.sequence import Dropout
from thinkclearly.training.adapters import add_lora
from thinkclearly.training.callbacks import EpochOfDropout
from thinkclearly.training.options import RunArguments
from thinkclearly.training.supervised import SupervisedTrainer

ROOT = Path(__file__).parents[1]
CODES, GRID = 128, 6
POSITIONS = GRID**2
KINDS = ("text to image", "edit", "two pictures", "question")
SIZES = ((96, 96), (144, 96), (96, 144))


def write_records(folder, count):
    """`count` records of each kind, in turn, that share no picture; targets are square, wide and tall."""
    folder.mkdir(parents=True, exist_ok=True)
    photos, records = packaged_photos("train"), []
    for i in range(4 * count):
        kind, record = KINDS[i % 4], {"input_prompt": f"Number {i}: make it blue."}
        pictures = []
        for part in range(2):
            edit = random_edit(11, 2 * i + part, photos)
            pictures += edit.render(*SIZES[i // 4 % 3])[:2]
        for part, picture in enumerate(pictures):
            picture.save(folder / f"{i}-{part}.png")
        shown = {"two pictures": 2, "text to image": 0}.get(kind, 1)
        record["input_image"] = [f"{i}-{part}.png" for part in range(shown)]
        record |= {"output_text": f"A star of {i}."} if kind == "question" else {"output_image": f"{i}-3.png"}
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"), 6)


@pytest.fixture(scope="module")
def rows(golden, data, tmp_path_factory):
    checkpoint = load_checkpoint(str(golden / "checkpoint"))
    return prepare_samples(sharegpt4o_samples(data), checkpoint, tmp_path_factory.mktemp("prepared"))


def fresh(golden):
    """A model to train without instruction tokens; its LoRA is not at its neutral start."""
    torch.manual_seed(0)
    checkpoint = load_checkpoint(golden / "checkpoint")
    config = ClearConfig(CODES, instructions=[], codebook_hash=checkpoint.token_model.codebook_fingerprint())
    model = add_lora(checkpoint, str(golden / "checkpoint"), config, r=4, lora_alpha=8, lora_dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model, checkpoint.processor


def make_trainer(pair, rows, folder, *, drop=(0.0, 0.0), answer_weight=0.5, eval_rows=None, collate=(), **options):
    model, processor = pair
    collator = Collator(processor, model.vocabulary, Dropout(*drop, seed=3), **dict(collate))
    defaults = {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "learning_rate": 1e-3}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "method": "sft"}
    return SupervisedTrainer(
        model=model,
        processor=processor,
        data_collator=collator,
        answer_weight=answer_weight,
        args=RunArguments(output_dir=str(folder), **(defaults | options)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        callbacks=[EpochOfDropout(collator)],
    )


@torch.no_grad()
def sums_of(pair, row):
    """Of one record, by plain cross-entropies: that of each code, or of each word of the answer."""
    model, processor = pair[0].eval(), pair[1]
    batch = Collator(processor, model.vocabulary)([row])
    if len(row["output_tokens"]):
        logits = model.teacher_forced_logits(**batch)[0]
        return F.cross_entropy(logits, torch.tensor(row["output_tokens"]), reduction="none")
    family = model.token_model
    prompt = PromptBatch(**{name: batch[name] for name in PromptBatch.__dataclass_fields__})
    embeds = family.embed_prompt(prompt, family.see(batch["pixel_values"]), batch["source_tokens"])
    logits = family.word_logits(family.language_model(inputs_embeds=embeds).last_hidden_state[0])
    text = processor.tokenizer.decode(prompt.input_ids[0])
    assert text.endswith(f" {row['answer']}<｜end▁of▁sentence｜>"), text
    ids = processor.tokenizer.encode(f" {row['answer']}<｜end▁of▁sentence｜>", add_special_tokens=False)
    assert prompt.input_ids[0, -len(ids) :].tolist() == ids
    return F.cross_entropy(logits[-len(ids) - 1 : -1], torch.tensor(ids), reduction="none")


def weighted_mean(pair, rows, answer_weight=0.5):
    """Over all codes and words of the records, a word counting `answer_weight`."""
    total = weights = 0.0
    for row in rows:
        nll, weight = sums_of(pair, row), 1.0 if len(row["output_tokens"]) else answer_weight
        total, weights = total + weight * nll.sum().item(), weights + weight * len(nll)
    return total / weights


# ---- the loss ----------------------------------------------------------------------------------------------------


def test_a_batch_of_all_kinds_trains_a_step_on_the_weighted_mean_of_codes_and_words(golden, rows, tmp_path):
    pair, four = fresh(golden), rows.select(range(4))
    assert [(len(row["sources"]), row["answer"] is not None) for row in four] == [
        (0, False),
        (1, False),
        (2, False),
        (1, True),
    ]
    expected, before = weighted_mean(pair, four.to_list()), trained(pair[0])
    trainer = make_trainer(pair, four, tmp_path, max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    ((loss,),) = history(trainer, "loss")
    assert loss == pytest.approx(expected, rel=1e-5)
    log = trainer.state.log_history[0]
    assert 0 <= log["accuracy"] <= 1 and 0 <= log["answer_accuracy"] <= 1
    after = trained(pair[0])
    assert [name for name in after if "lora_" in name and not torch.equal(after[name], before[name])]


def test_accumulation_and_batches_train_identically(golden, rows, tmp_path):
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(fresh(golden), rows.select(range(8)), tmp_path, drop=(0.2, 0.5), **options)
        trainer.train()
        runs.append((history(trainer, "loss", "grad_norm"), trained(trainer.model)))
    assert len(runs[0][0]) == 2
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=2e-4)
    for name, weight in runs[1][1].items():
        torch.testing.assert_close(weight, runs[0][1][name], atol=2e-4, rtol=1e-3)


def test_evaluation_is_the_same_for_any_batch_size(golden, rows, tmp_path):
    pair, five = fresh(golden), rows.select([0, 1, 2, 3, 7])
    expected, found = weighted_mean(pair, five.to_list()), []
    for size in (1, 2, 4):
        trainer = make_trainer(pair, five, tmp_path, eval_rows=five, drop=(1.0, 1.0), per_device_eval_batch_size=size)
        values = trainer.evaluate()
        assert values["eval_loss"] == pytest.approx(expected, rel=1e-5)
        found.append([values["eval_accuracy"], values["eval_answer_accuracy"]])
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-6)


def inside(width, height):
    """Positions of the grid that a target of this shape covers; both shapes leave bars of a patch on two sides."""
    shown = np.zeros((GRID, GRID), bool)
    rows, columns = (slice(1, 5) if length < max(width, height) else slice(0, 6) for length in (height, width))
    shown[rows, columns] = True
    return torch.from_numpy(shown.ravel())


@pytest.mark.parametrize("shape", [1, 2], ids=["wide", "tall"])
def test_gray_bars_carry_no_loss_on_request(golden, rows, tmp_path, shape):
    pair, row = fresh(golden), rows[4 * shape]
    nll, shown = sums_of(pair, row), inside(*SIZES[shape])
    assert shown.sum() == 24 and row["content"] == shown.tolist()
    for options, expected in (({}, nll.mean()), ({"skip_padding": True}, nll[shown].mean())):
        trainer = make_trainer(pair, [row], tmp_path, eval_rows=[row], collate=options, max_steps=1, learning_rate=0.0)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
        trainer.train()
        assert history(trainer, "loss")[0][0] == pytest.approx(expected.item(), rel=1e-5)


def test_what_an_edit_leaves_alone_keeps_the_sources_codes_on_request(golden, tmp_path):
    edit = random_edit(3, 1, packaged_photos("train"), ("recolour",))
    for name, picture in zip(("in", "out"), edit.render(96)):
        picture.save(tmp_path / f"{name}.png")
    records = [
        {"input_prompt": edit.instruction, "input_image": ["in.png"], "output_image": "out.png"},
        {"input_prompt": "A star.", "output_image": "out.png"},
        {"input_prompt": "What is it?", "input_image": ["in.png"], "output_text": "A star."},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    checkpoint = load_checkpoint(str(golden / "checkpoint"))
    prepared = prepare_samples(sharegpt4o_samples(tmp_path / "data.json"), checkpoint, tmp_path / "prepared")
    changed = patch_difference(edit.before.render(96), edit.after.render(96), GRID).ravel() > 16
    assert 0 < changed.sum() < POSITIONS
    plain, drawing, _ = prepared["output_tokens"]
    kept, same, none = with_source_codes(prepared, tolerance=16)["output_tokens"]
    assert kept == np.where(changed, plain, prepared["input_tokens"][0]).tolist()
    assert kept != plain and same == drawing and none == []
    # And counts less, where that is asked for.
    vocabulary = InstructionVocabulary(CODES, ())
    batch = Collator(checkpoint.processor, vocabulary, source_weight=0.25)(
        list(with_source_codes(prepared, tolerance=16))
    )
    assert batch["counted"].tolist() == [np.where(changed, 1, 0.25).tolist(), [1] * POSITIONS]


def test_the_originals_shift_leaves_the_first_code_out(golden, rows, tmp_path):
    pair, row = fresh(golden), rows[1]
    nll = sums_of(pair, row)
    trainer = make_trainer(
        pair, [row], tmp_path, eval_rows=[row], collate={"legacy_shift": True}, max_steps=1, learning_rate=0.0
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll[1:].mean().item(), rel=1e-5)
    trainer.train()
    assert history(trainer, "loss")[0][0] == pytest.approx(nll[1:].mean().item(), rel=1e-5)
    # Both at once: the bars and the first code, which lies in one of them where the target is tall or wide.
    row = rows[4]
    both = {"legacy_shift": True, "skip_padding": True}
    trainer = make_trainer(pair, [row], tmp_path, eval_rows=[row], collate=both)
    expected = sums_of(pair, row)[inside(*SIZES[1])].mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_questions_alone_train_and_are_evaluated(golden, rows, tmp_path):
    pair, questions = fresh(golden), rows.select([3, 7])
    expected = weighted_mean(pair, questions.to_list())
    trainer = make_trainer(pair, questions, tmp_path, eval_rows=questions, max_steps=1, per_device_train_batch_size=2)
    values = trainer.evaluate()
    assert values["eval_loss"] == pytest.approx(expected, rel=1e-5) and "eval_accuracy" not in values
    trainer.train()
    assert history(trainer, "loss")[0][0] == pytest.approx(expected, rel=1e-5)


# ---- the command -------------------------------------------------------------------------------------------------


def flags(options):
    found = []
    for name, value in options.items():
        found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


@pytest.fixture(scope="module")
def settings(golden, data, tmp_path_factory):
    """A recipe on the reference base."""
    options = {"method": "sft", "base_model": golden / "checkpoint", "source": "sharegpt4o", "path": data}
    options |= {
        "prepared_dir": tmp_path_factory.mktemp("prepared"),
        "eval_samples": 5,
        "lora_r": 4,
        "lora_dropout": 0.1,
    }
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 4, "save_steps": 2}
    return options | {"logging_steps": 1, "eval_steps": 4, "learning_rate": 1e-3, "use_cpu": "true"}


@pytest.fixture(scope="module")
def finetune(settings, one_thread, tmp_path_factory):
    """What the command leaves."""
    folder = tmp_path_factory.mktemp("run") / "model"
    cli.main(["train", *flags(settings | {"output_dir": folder})])
    return folder


def test_a_run_that_is_killed_goes_on_by_the_same_command_and_ends_bit_identical(settings, finetune, tmp_path):
    argv = ["train", *flags(settings | {"output_dir": tmp_path})]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run_and_kill(argv, 3, environment)
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "adapter_model.safetensors").exists()
    cli.main(argv)
    for name in ("adapter_model.safetensors", "clear_config.json"):
        assert (tmp_path / name).read_bytes() == (finetune / name).read_bytes(), name
    assert results(tmp_path)["eval_loss"] == results(finetune)["eval_loss"]


def test_two_processes_train_and_evaluate_as_one(settings, tmp_path):
    options = settings | {"lora_dropout": 0.0, "max_steps": 2, "logging_steps": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    cli.main(["train", *flags(options | {"output_dir": one, "per_device_train_batch_size": 4})])
    command = [
        Path(sys.executable).parent / "accelerate",
        "launch",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    command += ["--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml", ROOT / "scripts" / "train.py"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(part) for part in [*command, *flags(options | {"output_dir": two})]]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    for name in ("eval_loss", "eval_accuracy", "eval_answer_accuracy"):
        assert results(two)[name] == pytest.approx(results(one)[name], rel=1e-4), name
    logs = [
        [
            [log["loss"], log["grad_norm"]]
            for log in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "loss" in log
        ]
        for folder in (one, two)
    ]
    np.testing.assert_allclose(logs[1], logs[0], rtol=2e-4)


def test_full_fine_tuning_trains_exactly_the_parts_that_are_named(golden, settings, tmp_path):
    parts = ["generation_aligner", "lm_head"]
    options = settings | {"lora_r": 0, "train_parts": parts, "max_steps": 1, "eval_strategy": "no"}
    # A batch of all kinds: where none answers, the head of words has nothing to learn from.
    cli.main(["train", *flags(options | {"output_dir": tmp_path, "per_device_train_batch_size": 16})])
    base, model = (load_checkpoint(str(folder)).token_model for folder in (golden / "checkpoint", tmp_path))
    for name, part in base.parts().items():
        before, after = part.state_dict(), model.parts()[name].state_dict()
        moved = [key for key, value in before.items() if not torch.equal(after[key], value)]
        assert sorted(moved) == (sorted(before) if name in parts else []), name


def test_a_part_that_is_not_there_is_an_error_that_lists_them(settings, tmp_path, caplog):
    with pytest.raises(SystemExit):
        cli.main(["train", *flags(settings | {"output_dir": tmp_path, "train_parts": ["vqmodel"]})])
    assert "train_parts: vqmodel; choose from " in caplog.text and "generation_head" in caplog.text


# ---- what is saved -----------------------------------------------------------------------------------------------


def test_the_saved_adapter_draws_edits_and_answers(golden, finetune):
    editor = load_model(finetune)
    assert len(editor.model.vocabulary) == 0
    settings = {"seed": 3}
    assert editor.generate("A red star.", **settings)[0].size == (96, 96)
    edited = editor.edit(golden / "images" / "landscape.png", "Make it blue.", **settings)
    assert edited.clear_fraction == 0 and edited.image.size == edited.source.size
    assert editor.describe(golden / "images" / "square.png", "What is it?", max_new_tokens=4)
    base = load_model(golden / "checkpoint").edit(golden / "images" / "landscape.png", "Make it blue.", **settings)
    assert not torch.equal(base.class_ids, edited.class_ids), "the adapter is there"


def test_its_card_promises_no_copying(finetune):
    card = (finetune / "README.md").read_text(encoding="utf-8")
    assert "<CLEAR>" not in card and "pipeline(" not in card
    assert "thinkclearly.load_model(" in card and "draws the whole picture anew" in card


@pytest.mark.parametrize("layout", ["native", "deepseek"])
def test_merged_weights_are_pushed_in_either_layout_and_draw_as_the_adapter_does(golden, finetune, layout):
    expected = load_model(finetune).edit(golden / "images" / "landscape.png", "Make it blue.", seed=3)
    options = {"base_model_id": "you/base", "license": "mit", "merged": layout, "dtype": torch.float32}
    with staged(finetune, "you/edit", **options) as folder:
        assert not (folder / "adapter_config.json").exists()
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        assert kind == {"native": "janus", "deepseek": "multi_modality"}[layout]
        if layout == "deepseek":
            keys = load_file(folder / "model.safetensors").keys()
            whole = load_file(golden / "checkpoint" / "model.safetensors").keys()
            assert keys == {key for key in whole if ".attn_pool." not in key}  # which no Janus model runs
        found = load_model(folder).edit(golden / "images" / "landscape.png", "Make it blue.", seed=3)
    assert torch.equal(found.class_ids, expected.class_ids)
