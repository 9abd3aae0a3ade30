"""What a newcomer runs first answers without waiting for torch, and prints nothing that is not ours."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import thinkclearly
from thinkclearly import cli
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.training.methods import METHODS

ROOT = Path(__file__).parents[1]
JOB = """
import logging, sys
from thinkclearly import cli

def run(*argv):
    try:
        cli.main(list(argv))
    except SystemExit as stop:
        assert not stop.code, argv
"""


def python(code, folder):
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert not stop.value.code
    return capsys.readouterr().out


# ---- what is imported ----------------------------------------------------------------------------------------------


def test_help_and_version_import_nothing_that_takes_seconds(tmp_path):
    code = JOB + "run('--help'); run('--version'); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    result = python(code, tmp_path)
    assert result.stdout.endswith(f"\nthinkclearly {thinkclearly.__version__}\nset()\n") and not result.stderr


def test_help_of_jobs_that_train_nothing_waits_for_no_torch(tmp_path):
    jobs = ("edit", "generate", "describe", "convert", "push")
    result = python(JOB + f"for job in {jobs}: run(job, '--help')\nprint('torch' in sys.modules)", tmp_path)
    assert result.stdout.endswith("\nFalse\n") and not result.stderr


def test_every_public_name_is_there_when_asked_for():
    assert {name for name in thinkclearly.__all__ if getattr(thinkclearly, name).__name__ == name} == set(
        thinkclearly.__all__
    )
    assert set(thinkclearly.__all__) <= set(dir(thinkclearly))
    with pytest.raises(AttributeError, match="'thinkclearly' has no attribute 'load_editr'"):
        thinkclearly.load_editr  # noqa: B018


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_of_train_is_our_options_by_group_a_line_each(capsys):
    page = help_of(capsys, "train", "--help")
    assert len(page.splitlines()) < 110
    methods, *groups = [block.splitlines() for block in page.split("\n\n")[2:-1]]
    assert methods[0] == "Methods (--method NAME):" and [line.split()[0] for line in methods[1:]] == list(METHODS)
    assert len(groups) > 4
    for heading, *options in groups:
        assert heading.endswith(":") and options
        assert all(re.match(r"  --\w+ +\S", line) for line in options)
    assert re.search(r"\n  --lora_r +Rank of .* \(default: 8\)\n", page)
    assert "--adam_beta1" not in page and "--help_all" in page.splitlines()[-1]


def test_help_all_adds_transformers_own_options_at_the_end(capsys):
    ours, everything = help_of(capsys, "train", "--help"), help_of(capsys, "train", "--help_all")
    assert everything.startswith(ours[: ours.index("\n--help_all")])
    assert re.search(r"\n  --adam_beta1 .* \(default: 0.9\)\n", everything) and "%%" not in everything


def test_help_after_a_recipe_shows_the_recipes_values(capsys):
    page = help_of(capsys, "train", str(ROOT / "recipes" / "tiny.yaml"), "--help")
    assert re.search(r"\n  --lora_r .* \(default: 32\)\n", page)


def test_help_says_what_is_required(capsys):
    assert re.search(r"\n  --prompt .* \(required\)\n", help_of(capsys, "generate", "--help"))


# ---- stderr --------------------------------------------------------------------------------------------------------


def foreign(stderr):
    """The lines that are neither progress bars nor logged by us."""
    lines = [line.replace("\x1b[A", "").strip() for line in re.split(r"[\r\n]+", stderr)]
    bar = re.compile(r"\[\d\d:\d\d.*\]$")
    return [line for line in lines if line and not bar.search(line) and not line.startswith("INFO thinkclearly")]


@pytest.fixture
def photo(tmp_path):
    random_edit(1, 1, packaged_photos("test")).render(150, 100)[0].save(tmp_path / "photo.jpg", quality=95)
    return tmp_path / "photo.jpg"


def test_the_happy_path_prints_only_our_own_lines(photo, tmp_path):
    lines = """
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
run("edit", "--image", "photo.jpg", "--instruction", "Make the star red.")
run("generate", "--prompt", "A star.")
run("describe", "--model", "tiny", "--image", "photo.jpg", "--max_new_tokens", "4")
run("convert", "--model", "tiny", "--output_dir", "converted", "--to", "deepseek")
run("evaluate", "outputs/edit")
"""
    result = python(JOB + lines, tmp_path)
    # A table has many lines, of which the first is the record's.
    assert [line for line in foreign(result.stderr) if not line.startswith(("|", "**"))] == []
    assert result.stderr.count("Using the tiny model that ships along") == 2
    assert (tmp_path / "outputs" / "edit" / "pixel_composite.png").is_file()


def test_training_and_calibrating_print_only_our_own_lines(tmp_path):
    lines = f"""
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
data = "--limit 4 --eval_samples 4 --prepared_dir prepared".split()
recipe, once = {str(ROOT / "recipes" / "tiny.yaml")!r}, "--max_steps 1 --sample_edits 1 --output_dir model"
run("train", recipe, *data, *once.split())
run("calibrate", "--model", "model", *data)
"""
    assert foreign(python(JOB + lines, tmp_path).stderr) == []


def test_the_readmes_five_lines_say_in_one_that_they_use_the_tiny_model(photo, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    (line,) = foreign(python(code, tmp_path).stderr)
    assert "Using the tiny model that ships along" in line and (tmp_path / "edited.png").is_file()
