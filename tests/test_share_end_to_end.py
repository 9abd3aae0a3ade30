"""From `train` over `push` to `pipeline` in a process that has never seen the model: the real commands, over HTTP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_publish import client

from thinkclearly import load_editor
from thinkclearly.data.shapes import packaged_photos, random_edit

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

READ = """
import hashlib, json, sys
from transformers import pipeline
{imports}
photo, prompt, output = sys.argv[1:]
edit = pipeline("clear-edit", {model}, device="cpu")
result = edit(photo, prompt=prompt, seed=3)
result.image.save(output)
print(json.dumps(result.tokens.tolist()))
"""


def run(command, env):
    result = subprocess.run([*map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


@pytest.fixture
def photo(tmp_path):
    edit = random_edit(5, 3, packaged_photos("test"))
    edit.render(120, 90)[0].save(tmp_path / "photo.png")
    return tmp_path / "photo.png", edit.instruction


def test_train_push_and_edit_elsewhere_with_the_same_pixels(hub, photo, tmp_path):
    path, prompt = photo
    output = tmp_path / "clear"
    options = {"limit": 16, "eval_samples": 2, "max_steps": 2, "output_dir": output, "prepared_dir": tmp_path / "data"}
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    here = client(hub, tmp_path / "here")
    run([BIN / "thinkclearly", "train", "recipes/tiny.yaml", *flags], here)
    run([BIN / "thinkclearly", "push", output, "--repo_id", "you/edit", "--license", "mit"], here)
    editor = load_editor(output)
    expected = editor.edit(path, prompt, seed=3)
    with_package = READ.format(imports="import thinkclearly", model='model="you/edit"')
    without = READ.format(imports="", model='model="you/edit", config="you/edit", trust_remote_code=True')
    for name, script in (("imported", with_package), ("remote", without)):
        elsewhere = client(hub, tmp_path / name)
        found = run([sys.executable, "-c", script, path, prompt, tmp_path / f"{name}.png"], elsewhere)
        assert json.loads(found.stdout.splitlines()[-1]) == expected.ids.tolist()
        assert Image.open(tmp_path / f"{name}.png").tobytes() == expected.image.tobytes()
