"""What the README prints works as printed."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from thinkclearly.data.shapes import Background, Scene, Shape, ShapeEdit, packaged_photos

README = Path(__file__).parents[1] / "README.md"


def test_the_five_lines_do_the_edit_that_they_ask_for_and_keep_the_rest(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len([line for line in code.splitlines() if line]) <= 5
    words, colour, shape, other = re.search(r'"(Make the (\w+) (\w+) (\w+)\.)"', code).groups()
    before = Scene(Background(photo=packaged_photos("test")[0]), (Shape(shape, colour, "center", 0.5, 0.5, 0.15),))
    after = replace(before, shapes=(replace(before.shapes[0], colour=other),))
    edit = ShapeEdit("recolour", words, before, after)
    photo, _, mask = edit.render(150, 100)
    photo.save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    edited, source = Image.open(tmp_path / "edited.png"), Image.open(tmp_path / "photo.jpg")
    assert edited.size == source.size
    assert edit.is_done(edited) and not edit.is_done(source)
    same = (np.asarray(edited) == np.asarray(source)).all(-1)
    assert 0.8 < same[np.asarray(mask) == 0].mean() < 1 and same[np.asarray(mask) > 0].mean() < 0.1


def test_every_file_it_links_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links and all((README.parent / link).exists() for link in links)
