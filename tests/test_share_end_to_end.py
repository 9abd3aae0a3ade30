"""From `train` over `push` to `pipeline` in a process that has never seen the model: the real commands, over HTTP."""

import json
import re
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

REMOTE = """
import json, sys
from transformers import pipeline
photo, prompt, output = sys.argv[1:]
edit = pipeline("clear-edit", model="you/edit", config="you/edit", trust_remote_code=True, device="cpu")
result = edit(photo, prompt=prompt, seed=3)
result.image.save(output)
print(json.dumps(result.class_ids.tolist()))
"""


def run(command, env, cwd=ROOT):
    result = subprocess.run([*map(str, command)], env=env, cwd=cwd, capture_output=True, text=True)
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
    found = run(
        [sys.executable, "-c", REMOTE, path, prompt, tmp_path / "remote.png"], client(hub, tmp_path / "remote")
    )
    assert json.loads(found.stdout.splitlines()[-1]) == expected.class_ids.tolist()
    assert Image.open(tmp_path / "remote.png").tobytes() == expected.image.tobytes()
    # The lines that the card prints, as they are.
    (snippet,) = re.findall(r"```python\n(.*?)```", hub.files("you/edit")["README.md"].decode(), flags=re.S)
    path.rename(tmp_path / "photo.jpg")
    run([sys.executable, "-c", snippet], client(hub, tmp_path / "imported"), cwd=tmp_path)
    (words,) = re.findall(r'prompt="(.*?)"', snippet)
    own = editor.edit(tmp_path / "photo.jpg", words)
    assert Image.open(tmp_path / "edited.png").tobytes() == own.image.tobytes()
