"""Every job from its command line, in process: help, user errors, and what each writes on the reference base."""

import ast
import json
import logging
import shutil
import subprocess
import sys
from argparse import SUPPRESS
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

from thinkclearly import cli
from thinkclearly.commands import evaluate
from thinkclearly.data.jsonl import read_jsonl
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.data.sources import EditExample, write_folder
from thinkclearly.evaluation.benchmarks import drawn
from thinkclearly.models.folder import TINY
from thinkclearly.models.instruction_head import CONFIG_FILE
from thinkclearly.recipe import RecipeParser
from thinkclearly.training.methods import load_method, option_classes
from thinkclearly.training.options import RunArguments

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.stem not in ("edit", "geneval_janus_pro"))
OTHERS = [path for path in RECIPES if not yaml.safe_load(path.read_text()).get("method", "clear") == "clear"]
SCRIPTS = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.stem in cli.JOBS)
PARSED = [name for name in cli.JOBS if name != "evaluate"]  # evaluate takes a folder and no options


@pytest.fixture(autouse=True)
def quiet(caplog):
    """The levels that `cli.start` sets last for one test only."""
    levels = {name: logging.getLogger(name).level for name in ("httpx", "httpx2", "datasets", "filelock")}
    caplog.set_level(logging.INFO)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def base(golden):
    return golden / "checkpoint"


def thinkclearly(*argv):
    """The command, with everything as text; exit status 0 where it returns."""
    try:
        cli.main([str(part) for part in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def fails(capsys, caplog, *argv):
    """The message of a command that a user got wrong: exit status 1, no traceback."""
    assert thinkclearly(*argv) == 1
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "thinkclearly" and record.exc_info is None
    return record.getMessage()


def parser_of(job, monkeypatch):
    """The parser that a job makes for itself."""
    parsers = []

    def stop(parser, argv):
        parsers.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RecipeParser, "parse", stop)
        pytest.raises(SystemExit, import_module(f"thinkclearly.{cli.JOBS[job][0]}").main, [])
    return parsers[0]


# ---- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_job_with_a_sentence(flag, capsys):
    assert thinkclearly(flag) == 0
    page = capsys.readouterr().out.splitlines()
    assert page[0].startswith("usage: thinkclearly JOB")
    for name in cli.JOBS:
        (line,) = [line for line in page if line.split()[:1] == [name]]
        assert len(line.split()) > 4 and line.endswith(".")


@pytest.mark.parametrize("job", cli.JOBS)
def test_every_job_has_help(job, capsys):
    assert thinkclearly(job, "--help") == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: thinkclearly {job}") and len(page.splitlines()) > 5


@pytest.mark.parametrize("job", PARSED)
def test_every_own_option_has_a_help_text(job, monkeypatch):
    theirs = {f.name for f in fields(TrainingArguments)} - set(RunArguments.__annotations__)
    options = [action for action in parser_of(job, monkeypatch)._actions if action.dest not in theirs | {"help"}]
    # --no_KEY, which argparse gets for an option that is on by default, has the text of --KEY.
    lacking = [o.dest for o in options if o.help in (None, SUPPRESS) or len(o.help) < 5 or o.help.strip()[-1] != "."]
    assert options and not lacking


def test_help_of_train_shows_the_recipe_keys(capsys):
    thinkclearly("train", "--help")
    page = capsys.readouterr().out
    for name in ("--base_model", "--lora_r", "--clear_label", "--clear_weight", "--learning_rate", "--cfg_weight2"):
        assert f"\n  {name} " in page


# ---- what a user can get wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["frobnicate"], ["--model", "x"], []])
def test_unknown_job(argv, capsys):
    assert thinkclearly(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("usage: thinkclearly JOB")
    assert not argv or f"unknown job {argv[0]!r}" in printed.err


def test_unknown_option_and_missing_option(capsys):
    assert thinkclearly("edit", "--image", "a.png", "--instruction", "x", "--cfg_wieght", "2") == 2
    assert "did you mean 'cfg_weight'" in capsys.readouterr().err
    assert thinkclearly("edit", "--image", "a.png") == 2
    assert "--instruction" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["generate", "--prompt", "x", "--dtype", "floot32"],
            "dtype='floot32'; choose from float32, bfloat16, float16",
        ),
        (
            ["convert", "--model", "a", "--output_dir", "b", "--to", "nativ"],
            "to='nativ'; choose from native, deepseek",
        ),
        (["convert", "--model", "a", "--output_dir", "b", "--dtype", "int8"], "dtype='int8'; choose from float32"),
        (["prepare", "--source", "folder"], "source: folder needs path"),
    ],
)
def test_values_are_checked_before_any_work(argv, message, capsys):
    assert thinkclearly(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["--dir", "a"], ["--help", "a"]])
def test_evaluate_takes_one_folder(argv, capsys):
    assert thinkclearly("evaluate", *argv) == 2
    assert "usage: thinkclearly evaluate DIR" in capsys.readouterr().out


def test_absent_files_are_named(base, golden, tmp_path, capsys, caplog):
    message = fails(capsys, caplog, "evaluate", tmp_path / "nothing")
    assert message.startswith("FileNotFoundError: ") and "nothing is not a folder" in message
    caplog.clear()
    model = ["--model", golden / "finetune", "--base", base]
    message = fails(capsys, caplog, "edit", *model, "--image", tmp_path / "none.png", "--instruction", "x")
    assert "none.png" in message
    caplog.clear()
    message = fails(capsys, caplog, "describe", "--model", tmp_path / "none", "--image", "a.png")
    assert "none is neither a folder nor a Hub repository" in message


def test_a_base_model_cannot_edit_and_has_no_other_base(base, capsys, caplog):
    argv = ["--model", base, "--image", "a.png", "--instruction", "x"]
    assert "holds no CLEAR head" in fails(capsys, caplog, "edit", *argv)
    caplog.clear()
    message = fails(capsys, caplog, "generate", "--model", base, "--base", base, "--prompt", "x")
    assert "is a base model, not a fine-tune; leave out base=" in message


def test_the_shipped_base_cannot_edit_and_says_what_can(capsys, caplog):
    message = fails(capsys, caplog, "edit", "--model", "tiny", "--image", "a.png", "--instruction", "x")
    assert "'tiny' is the base model that ships along" in message and "leave out --model" in message


def test_a_fine_tune_that_is_incomplete_is_not_taken_for_a_base(golden, base, tmp_path, capsys, caplog):
    for name in ("adapter_config.json", "adapter_model.safetensors", "clear_meta.json"):
        (tmp_path / name).write_bytes((golden / "finetune" / name).read_bytes())
    message = fails(capsys, caplog, "generate", "--model", tmp_path, "--base", base, "--prompt", "x")
    assert "has no gen_head_clear.pt" in message


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_device_that_is_not_there(device, base, capsys, caplog):
    message = fails(capsys, caplog, "generate", "--model", base, "--prompt", "x", "--device", device)
    assert message.startswith(f"ValueError: device='{device}' cannot be used here: ")


def test_convert_overwrites_nothing(base, tmp_path, capsys, caplog):
    (tmp_path / "kept").write_text("kept")
    for layout in ("native", "deepseek"):
        caplog.clear()
        message = fails(capsys, caplog, "convert", "--model", base, "--output_dir", tmp_path, "--to", layout)
        assert "is not an empty folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


# ---- jobs on the reference base ----------------------------------------------------------------------------------


def test_generate_writes_pictures_that_a_seed_repeats(base, tmp_path, caplog):
    argv = ["generate", "--model", base, "--prompt", "A red circle.", "--num_images", 2, "--device", "cpu"]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert thinkclearly(*argv, "--output_dir", tmp_path / name, "--seed", seed) == 0
    assert f"2 pictures in {tmp_path / 'c'}" in caplog.messages
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0000.png", "0001.png"]
    pictures = {path.relative_to(tmp_path).as_posix(): Image.open(path) for path in tmp_path.glob("*/*.png")}
    assert {picture.size for picture in pictures.values()} == {(96, 96)}
    first, second, again, other = (
        pictures[f"{name}.png"].tobytes() for name in ("a/0000", "a/0001", "b/0000", "c/0000")
    )
    assert first == again and first != second and first != other


def test_generate_draws_with_a_fine_tune(golden, base, tmp_path):
    model = ["--model", golden / "finetune", "--base", base]
    assert (
        thinkclearly("generate", *model, "--prompt", "A circle.", "--output_dir", tmp_path, "--use_cfg", "false") == 0
    )
    assert Image.open(tmp_path / "0000.png").size == (96, 96)


def test_describe_prints_answers(base, golden, capsys):
    argv = ["describe", "--model", base, "--image", golden / "images" / "landscape.png", "--max_new_tokens", 8]
    assert thinkclearly(*argv) == 0
    answer = capsys.readouterr().out
    assert answer.endswith("\n") and answer.strip()
    assert thinkclearly(*argv) == 0 and capsys.readouterr().out == answer
    assert thinkclearly(*argv, "--num_answers", 2, "--temperature", 1, "--question", "Which colour?") == 0
    assert capsys.readouterr().out.strip()


def test_convert_there_and_back_gives_the_same_weights(base, tmp_path):
    steps = {"native": base, "deepseek": tmp_path / "native", "again": tmp_path / "deepseek"}
    for name, source in steps.items():
        layout = "deepseek" if name == "deepseek" else "native"
        argv = ["convert", "--model", source, "--output_dir", tmp_path / name, "--to", layout, "--dtype", "float32"]
        assert thinkclearly(*argv) == 0
    kinds = {name: json.loads((tmp_path / name / "config.json").read_text())["model_type"] for name in steps}
    assert kinds == {"native": "janus", "deepseek": "multi_modality", "again": "janus"}
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "again"))
    assert first.keys() == second.keys() and len(first) > 100
    assert all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)


def test_convert_to_deepseek_keeps_the_files_that_its_code_reads(base, tmp_path):
    assert thinkclearly("convert", "--model", base, "--output_dir", tmp_path / "out", "--to", "deepseek") == 0
    for path in base.glob("*.json"):
        if path.name != "config.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["language_model.lm_head.weight"].dtype == torch.bfloat16
    assert weights["gen_vision_model.quantize.embedding.weight"].dtype == torch.float32


@pytest.fixture
def samples(tmp_path):
    """Four samples in the folder layout, with masks."""
    photos = packaged_photos("train")
    edits = [random_edit(5, i, photos) for i in range(4)]
    pictures = (EditExample(*edit.render(96, 96)[:2], edit.instruction, edit.render(96, 96)[2]) for edit in edits)
    write_folder(pictures, tmp_path / "samples")
    return ["--source", "folder", "--path", tmp_path / "samples", "--prepared_dir", tmp_path / "prepared"]


def test_prepare_writes_statistics_examples_and_records(base, samples, tmp_path, capsys, caplog):
    argv = ["prepare", "--base_model", base, *samples, "--output_dir", tmp_path / "look"]
    files = ["--jsonl", tmp_path / "records" / "train.jsonl", "--export_folder", tmp_path / "copy"]
    assert thinkclearly(*argv, "--eval_samples", 1, "--calibration_edits", 0, *files) == 0
    statistics = json.loads((tmp_path / "look" / "statistics.json").read_text())
    assert statistics["records"] == 3 and statistics["patches"] == 36
    assert 0 < statistics["clear_ratio"]["labels"]["mean"] < 1
    for name in ("statistics.png", "examples.png"):
        assert min(Image.open(tmp_path / "look" / name).size) > 96
    rows, _ = read_jsonl(tmp_path / "records" / "train.jsonl", 128, 36)
    assert len(rows) == 3 and "<CLEAR>" in (tmp_path / "records" / "train.jsonl").read_text()
    assert len(list((tmp_path / "copy").glob("sample_*/source.png"))) == 3

    # The records are a source themselves, but not one of pictures.
    argv = ["prepare", "--base_model", base, "--source", "jsonl", "--path", tmp_path / "records" / "train.jsonl"]
    assert thinkclearly(*argv, "--eval_samples", 0, "--output_dir", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "statistics.json").read_text())
    assert again["clear_ratio"]["labels"] == statistics["clear_ratio"]["labels"]
    assert "holds tokens only" in fails(capsys, caplog, *argv, "--export_folder", tmp_path / "more")


def test_prepare_that_leaves_nothing_to_train_on(base, samples, capsys, caplog):
    message = fails(capsys, caplog, "prepare", "--base_model", base, *samples, "--limit", 2)
    assert message == (
        "ValueError: 2 records are too few to hold some out (eval_samples=50, calibration_edits=64); add data, or set "
        "these to 0"
    )


def test_calibrate_writes_what_it_found_beside_the_weights(tmp_path, capsys, caplog):
    model = tmp_path / "model"
    shutil.copytree(TINY.parent / "tiny_clear", model)
    content = json.loads((model / CONFIG_FILE).read_text())
    (model / CONFIG_FILE).write_text(json.dumps(content | {"gate_bias": 3.0, "gate_temperature": 0.5}))
    data = ["--limit", 4, "--calibration_edits", 6, "--prepared_dir", tmp_path / "prepared"]
    assert thinkclearly("calibrate", "--model", model, *data) == 0
    (prepared,) = (tmp_path / "prepared").glob("*/preparation.json")
    assert json.loads(prepared.read_text())["records"] == 6  # neither those to train on nor those that are reported
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    found = json.loads((model / CONFIG_FILE).read_text())
    assert found["gate_temperature"] == pytest.approx(float(printed["gate_temperature"]), rel=1e-3) != 0.5
    assert found | {"gate_bias": 0, "gate_temperature": 0} == content | {"gate_bias": 0, "gate_temperature": 0}
    message = fails(capsys, caplog, "calibrate", "--model", model, "--calibration_edits", 0, *data[:2], *data[4:])
    assert "no held-out records with pictures" in message


# ---- recipes and scripts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path not in OTHERS], ids=lambda path: path.stem)
@pytest.mark.parametrize("job", ["train", "demo", "prepare"])
def test_recipes_are_read_by_every_job_that_documents_them(recipe, job, monkeypatch, tmp_path):
    options = parser_of(job, monkeypatch).parse([str(recipe), "--output_dir", str(tmp_path)])
    kinds = {type(part): part for part in options}
    assert job == "prepare" or set(option_classes(load_method("clear"))) <= kinds.keys()
    values = {name: value for part in options for name, value in vars(part).items()}
    assert values["output_dir"] == str(tmp_path) and values["source"] in ("magicbrush", "shapes")


def test_the_recipe_of_many_edits_is_read(monkeypatch):
    arguments, _ = parser_of("edit", monkeypatch).parse([str(ROOT / "recipes" / "edit.yaml"), "--input", "photos"])
    assert arguments.input == "photos" and arguments.on_bad_record == "skip"


def test_the_recipe_of_geneval_is_read_and_pins_all_that_decides_the_pictures(monkeypatch):
    read = {}
    monkeypatch.setattr(evaluate, "load_any", lambda arguments: read.update(model=arguments.model))
    monkeypatch.setattr(drawn, "run_drawn", lambda _, *options: read.update(zip(("run", "weights", "given"), options)))
    evaluate.main([str(ROOT / "recipes" / "geneval_janus_pro.yaml"), "--path", "prompts.jsonl"])
    assert read["model"] == "deepseek-ai/Janus-Pro-7B" and read["weights"]["dtype"] == "bfloat16"
    assert (read["run"].benchmark, read["run"].path, read["run"].num_images) == ("geneval", "prompts.jsonl", 4)
    pinned = {"use_cfg": True, "cfg_weight": 5.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert read["given"] == pinned and read["run"].seed == 42


def test_there_are_recipes_and_a_script_for_every_job_but_the_demo():
    assert len(RECIPES) >= 2 and {path.stem for path in SCRIPTS} == cli.JOBS.keys() - {"demo"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_only_delegate(script):
    docstring, imported, guard = ast.parse(script.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr) and f"thinkclearly {script.stem}" in docstring.value.value
    assert ast.unparse(imported) == "from thinkclearly.cli import start"
    assert ast.unparse(guard) == f"if __name__ == '__main__':\n    start('{script.stem}')"


def test_a_script_is_its_job():
    command = [sys.executable, ROOT / "scripts" / "edit.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: thinkclearly edit") and "--instruction" in result.stdout


@pytest.mark.slow
def test_a_compiled_model_edits_to_the_same_tokens(golden, tmp_path):
    argv = ["edit", "--model", str(golden / "finetune"), "--base", str(golden / "checkpoint")]
    argv += ["--image", str(golden / "images/square.png"), "--instruction", "Make it blue.", "--temperature", "0"]
    for flags in ([], ["--compile", "true"]):
        cli.main([*argv, *flags, "--output_dir", str(tmp_path / str(len(flags)))])
    plain, compiled = (json.loads((tmp_path / name / "result.json").read_text()) for name in "02")
    assert compiled["ids"] == plain["ids"] and compiled["passes"] == plain["passes"]
