"""What the README prints works as printed."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from thinkclearly.data.shapes import packaged_photos, random_edit

README = Path(__file__).parents[1] / "README.md"


def test_the_five_lines_edit_a_photo(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len([line for line in code.splitlines() if line]) <= 5
    photo = random_edit(1, 1, packaged_photos("test")).render(150, 100)[0]
    photo.save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    edited, source = Image.open(tmp_path / "edited.png"), Image.open(tmp_path / "photo.jpg")
    assert edited.size == source.size
    same = (np.asarray(edited) == np.asarray(source)).all(-1).mean()
    assert same == 1 or 0.05 < same < 1


def test_every_file_it_links_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links and all((README.parent / link).exists() for link in links)
