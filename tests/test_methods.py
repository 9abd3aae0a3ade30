"""A command line or recipe names its method, and then has that method's options and no other's."""

import pytest

from thinkclearly.training.clear import ClearArguments
from thinkclearly.training.methods import METHODS, all_option_classes, load_method, option_classes, parse_options
from thinkclearly.training.sft import SftArguments


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse(*argv):
    options, method, *_ = parse_options(list(argv), "thinkclearly train")
    return options.method, method, options.training.method


def printed(capsys, *argv, status=0):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == status
    out, err = capsys.readouterr()
    return err if status else out


@pytest.mark.parametrize("where", ["flag", "flag=", "recipe"])
def test_help_shows_the_options_of_the_method_and_not_anothers(recipe, capsys, where):
    named = {"flag": ["--method", "sft"], "flag=": ["--method=sft"], "recipe": [recipe("method: sft\n")]}[where]
    page = printed(capsys, *named, "--help")
    for name in ("--method", "--answer_weight", "--skip_padding", "--legacy_shift", "--lora_r", "--learning_rate"):
        assert f"\n  {name} " in page
    for name in ("--clear_weight", "--clear_head_lr", "--sample_edits", "--tune_clear_weight"):
        assert name not in page
    page = printed(capsys, "--help")
    assert "\n  --clear_weight " in page and "--answer_weight" not in page


def test_a_recipe_names_the_method_and_a_flag_overrides_it(recipe):
    own, method, name = parse(recipe("method: sft\nanswer_weight: 0.5\n"))
    assert own == SftArguments(answer_weight=0.5) and method is load_method("sft") and name == "sft"
    own, method, name = parse(recipe("method: sft\n"), "--method", "clear")
    assert own == ClearArguments() and method is load_method("clear") and name == "clear"
    assert parse()[2] == "clear"
    assert parse("--method", "clear", "--method", "sft")[1:] == (load_method("sft"), "sft")


@pytest.mark.parametrize("value", ["stf", "5", "[sft]"])
def test_an_unknown_method_is_an_error_that_lists_them(recipe, capsys, value):
    for argv in (["--method", value], [f"--method={value}"], [recipe(f"method: {value}\n")]):
        message = printed(capsys, *argv, status=2)
        assert message.startswith("thinkclearly train: error: method=") and "choose from clear, sft" in message
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "key", "near"),
    [
        ("sft", "clear_weight", "'cfg_weight'"),
        ("sft", "sample_edits", "'sample_gate'"),
        ("clear", "answer_weight", "'clear_weight'"),
        ("clear", "legacy_shift", "--help"),
    ],
)
def test_a_key_of_the_other_method_is_refused_with_the_nearest_name(recipe, capsys, method, key, near):
    message = printed(capsys, recipe(f"method: {method}\n{key}: 1\n"), status=2)
    assert f"unknown key '{key}'" in message and near in message
    assert f"unknown option --{key}" in printed(capsys, "--method", method, f"--{key}", "1", status=2)


def test_a_method_is_a_module_with_the_same_parts_as_the_others():
    for name in METHODS:
        method = load_method(name)
        for part in ("Arguments", "Trainer", "instructions", "read_data", "build", "finish"):
            assert callable(getattr(method, part)), (name, part)
        assert set(option_classes(method)) <= set(all_option_classes())
