"""Pages of thoughts: words and pictures in order, what changed outlined, whole in itself."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from test_report import Page

from thinkclearly.data.thought_files import write_lines
from thinkclearly.evaluation.thought_pages import outline_path, write_pages

HOSTILE = '<script>alert("x")</script> <image_7> & “é”'


def folder_of(tmp_path, *rows):
    for row in rows:
        for path in filter(None, row["image_paths"]):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), "red").save(tmp_path / path)
    write_lines(tmp_path / "thoughts.jsonl", rows)
    return tmp_path


def thought(number=0, **more):
    paths = [f"{number}/image_0.png", f"{number}/image_1.png", None]
    answer = f"<image_0>{HOSTILE}<image_1>\nDone.<invalid_image_2>"
    first = {"passes": 9, "codes": [0] * 16, "changed": None, "clear": None}
    second = {"passes": 4, "codes": [0] * 16, "changed": [0, 5, 6], "clear": list(range(7, 15))}
    row = {"sample_id": number, "text": "Think: " + answer, "answer": answer, "image_paths": paths, "prompt": HOSTILE}
    row |= {"mode": "critique", "seed": 3, "ended": "eos", "grid": 4, "size": 64, "pictures": [first, second, None]}
    return row | more


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_words_and_pictures_stand_in_order_and_nothing_is_fetched(tmp_path):
    write_pages(folder_of(tmp_path, thought()), "thoughts.jsonl")
    text, page = read(tmp_path / "0" / "index.html")
    body = [part.strip() for part in page.text if part.strip()]
    assert body[body.index("mode critique, seed 3, ended eos") :] == [
        *("mode critique, seed 3, ended eos", "Outline what changed", "Picture 1", "9 passes"),
        *(HOSTILE.split("<image_7>")[0].strip(), "<image_7>", HOSTILE.split("<image_7>")[1].strip()),
        *("Picture 2", "18.75 % changed, 50.00 % copied byte for byte, 4 passes"),
        *("Done.", "A picture that was not finished."),
    ]
    assert "Think:" not in text and "script" not in {tag for tag, _ in page.tags}
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 and all(image["src"].startswith("data:image/") for image in images)
    links = [attributes["href"] for tag, attributes in page.tags if "href" in attributes]
    assert links == ["../index.html"]


def test_the_list_shows_the_first_and_the_last_picture_of_each(tmp_path):
    without = thought(2, image_paths=[], pictures=[], answer="Only words.", text="Only words.")
    write_pages(folder_of(tmp_path, thought(), thought(1), without), "thoughts.jsonl")
    _, page = read(tmp_path / "index.html")
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["0/index.html", "1/index.html", "2/index.html"] and page.text.count("3 thoughts") >= 1
    shown = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert shown == [f"{k}/image_{i}.png" for k in (0, 1) for i in (0, 1)]
    assert all((tmp_path / path).is_file() for path in shown + links)


def test_what_the_originals_detokenizer_wrote_has_pages_too(tmp_path):
    row = {"sample_id": 4, "text": "A kite. <image_0> Fine.", "image_paths": ["4/image_0.png"]}
    write_pages(folder_of(tmp_path, row), "thoughts.jsonl")
    text, page = read(tmp_path / "4" / "index.html")
    assert "<h1>A kite.</h1>" in text and "Outline" not in text and "<svg" not in text
    assert [part.strip() for part in page.text if part.strip()][-3:] == ["A kite.", "Picture 1", "Fine."]


def test_an_outline_runs_between_cells_that_differ():
    mask = np.zeros((3, 3), bool)
    mask[0, 0] = mask[1, 1] = True
    edges = set(re.findall(r"M(\d) (\d)([hv])1", outline_path(mask)))
    first = {("0", "0", "h"), ("0", "1", "h"), ("0", "0", "v"), ("1", "0", "v")}
    second = {("1", "1", "h"), ("1", "2", "h"), ("1", "1", "v"), ("2", "1", "v")}
    assert edges == first | second and outline_path(np.zeros((2, 2), bool)) == ""
    assert len(re.findall("M", outline_path(np.ones((2, 2), bool)))) == 8


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_outline_over_the_picture_and_nothing_beside_the_page(tmp_path, width):
    write_pages(folder_of(tmp_path, thought()), "thoughts.jsonl")
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1900"]
    flags += [f"--screenshot={shot}", f"--user-data-dir={tmp_path / 'profile'}"]
    page = (tmp_path / "0" / "index.html").as_uri()
    subprocess.run([shutil.which("chromium"), *flags, page], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    red = np.abs(pixels - (255, 0, 0)).sum(-1) < 30
    assert red.sum() > 2 * 300**2, "two pictures, enlarged"
    assert not red[:, [0, -1]].any(), "nothing reaches the edge"
    line = np.abs(pixels - (0xB3, 0x26, 0x1E)).sum(-1) < 12
    assert line.sum() > 500 and line.any(1).nonzero()[0].min() > red.any(1).nonzero()[0].min() + 300, "on the second"
