"""The report page, its tables and curves, and the pictures it is made of."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from thinkclearly.evaluation.metrics import aggregate_image_metrics, clear_metrics, image_metrics
from thinkclearly.evaluation.report import write_report
from thinkclearly.reporting.curves import calibration_curve, training_curves
from thinkclearly.reporting.pictures import heat_map, mask_image, red_overlay, sheet
from thinkclearly.reporting.tables import format_number, markdown

VOID = {"meta", "img", "input", "source"}
LOG = [
    {"step": 10, "loss": 3.0, "clear_rate_true": 0.6, "clear_rate_predicted": 0.1, "learning_rate": 1e-4},
    {"step": 20, "loss": math.nan, "clear_rate_true": 0.6, "clear_rate_predicted": 0.5, "code_accuracy": 0.2},
    {"step": 20, "eval_loss": 2.0, "eval_gate_auc": 0.9},
    {"step": 20, "train_loss": 77.0, "train_runtime": 5.0},
]


class Page(HTMLParser):
    """Collects the tags, their attributes and the text, and checks that tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def picture(seed=0, size=(48, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def off_by(image, levels):
    return Image.fromarray(((np.asarray(image).astype(int) + levels) % 256).astype(np.uint8))


@pytest.fixture
def report(tmp_path):
    source, hostile = picture(), '<script>alert("x")</script> & “é”'
    row = {
        "source": source,
        "instruction": hostile,
        "raw": picture(1),
        "composite": source,
        "mask": np.eye(6, dtype=bool),
        "note": hostile,
    }
    metrics = {hostile: {"raw_model": image_metrics(picture(1), source), hostile: image_metrics(source, source)}}
    path = write_report(
        tmp_path / "out",
        hostile,
        lead=hostile,
        picks={hostile: {hostile: row}},
        results=[["", hostile], [hostile, hostile]],
        remarks=hostile,
        rows=[row],
        metrics=metrics,
        curves=LOG,
        notes={hostile: hostile},
    )
    return path, Page(path.read_text(encoding="utf-8")), hostile


def test_report_escapes_all_text(report):
    path, page, hostile = report
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in path.read_text(encoding="utf-8")
    # title twice, lead; heading, name, instruction and note of the pick; three cells of results, remarks; heading and
    # row of metrics; instruction and note of the edit; key and value of the notes
    assert sum(text.count(hostile) for text in page.text) == 17


def test_report_needs_nothing_outside_the_file(report):
    path, page, _ = report
    for _, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in path.read_text(encoding="utf-8") and "@import" not in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_report_shows_every_picture_and_its_numbers(report):
    _, page, _ = report
    names = [attributes["alt"] for tag, attributes in page.tags if tag == "img" and "width" in attributes]
    assert names[2:] == ["Source", "Edited area", "Raw", "Composite", "Raw − source", "Composite − source"]
    text = " ".join(page.text)
    assert "∞ dB, 100.00 % exact" in text
    assert "16.67 %" in text  # 6 of 36 patches


def test_report_opens_with_pictures_then_one_table_and_folds_the_rest(report):
    _, page, _ = report
    order = [tag for tag, _ in page.tags if tag in ("h1", "img", "table", "details")]
    assert order[:5] == ["h1", "img", "img", "table", "details"]  # before and after, results
    assert page.tags.count(("details", {})) == 4  # closed: numbers, curves, edits, notes
    assert [a["alt"] for tag, a in page.tags if tag == "img"][:2] == ["Before", "After"]


def test_report_shows_picks_larger_than_the_other_edits(tmp_path):
    large = {"source": picture(0, (1200, 900)), "composite": picture(1, (1200, 900)), "instruction": "i"}
    page = Page(write_report(tmp_path, "t", picks={"h": {"Best": large}}, rows=[large]).read_text())
    heights = [attributes["height"] for tag, attributes in page.tags if tag == "img"]
    assert heights == ["1024", "1024", "512", "512", "512"]  # the last is the heat map


def test_report_heat_maps_are_lossless(report):
    _, page, _ = report
    images = {attributes["alt"]: attributes["src"] for tag, attributes in page.tags if tag == "img"}

    def decode(name):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(images[name].split(",")[1]))).convert("RGB"))

    assert (decode("Raw − source") == np.asarray(heat_map(picture(1), picture()))).all()
    assert not decode("Composite − source").any()


def test_report_with_nothing_but_a_title(tmp_path):
    page = Page(write_report(tmp_path, "Only a title").read_text())
    assert not {"table", "img", "article", "h2", "details"} & {tag for tag, _ in page.tags}


def test_report_replaces_an_older_one_and_names_bad_rows(tmp_path):
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(ValueError, match="Row 2 of the report has no instruction"):
        write_report(tmp_path, "title", rows=[{"source": picture(), "instruction": "a"}, {"source": picture()}])
    assert (tmp_path / "report.html").read_text() == "old"
    write_report(tmp_path, "new")
    assert "<h1>new</h1>" in (tmp_path / "report.html").read_text()


def test_report_shrinks_large_pictures_and_skips_heat_maps_of_other_sizes(tmp_path):
    row = {"source": picture(0, (600, 1200)), "instruction": "shrink", "raw": picture(1)}
    page = Page(write_report(tmp_path, "t", rows=[row]).read_text())
    sizes = {a["alt"]: (a["width"], a["height"]) for tag, a in page.tags if tag == "img"}
    assert sizes == {"Source": ("512", "256"), "Raw": ("64", "48")}


def test_report_tables_show_regions_in_rows_by_their_labels(tmp_path):
    source, mask = picture(), np.zeros((48, 64), bool)
    mask[:10] = True
    rows = {
        name: aggregate_image_metrics([image_metrics(made, source, mask)])
        for name, made in {"raw_model": off_by(source, 3), "copy_source": source}.items()
    }
    clear = {"token masks": clear_metrics(np.ones(4, bool), np.array([True, True, True, False]))}
    page = Page(write_report(tmp_path, "t", metrics={"Source": rows, "CLEAR": clear}).read_text())
    text = [text for text in page.text if text.strip()]
    captions = [text[i] for i in range(len(text)) if text[i].startswith(("Source, ", "CLEAR"))]
    assert captions[:3] == ["Source, whole picture", "Source, inside the edit", "Source, outside the edit"]
    assert text.count("raw") == text.count("copy the source") == 3
    assert "75.00 %" in text and "token masks" in text


def test_curves_are_sorted_into_panels():
    charts = training_curves(LOG)
    assert list(charts) == ["Loss", "CLEAR rate", "Code accuracy", "Gate AUC"]
    comments = {title: set(re.findall(r"<!-- (.*?) -->", svg)) for title, svg in charts.items()}
    assert {"loss", "eval loss"} <= comments["Loss"]
    assert "train loss" not in comments["Loss"]
    assert {"clear rate true", "clear rate predicted"} <= comments["CLEAR rate"]
    assert training_curves([{"step": 1, "learning_rate": 1.0}, {"loss": 1.0}]) == {}


def test_calibration_curve_is_one_more_chart_of_the_report(tmp_path):
    rng = np.random.default_rng(0)
    gate = rng.normal(0, 3, 500), rng.random(500) < 0.5
    svg = calibration_curve(*gate, ink="#abcdef")
    assert svg == calibration_curve(*gate, ink="#abcdef") != calibration_curve(gate[0], ~gate[1], ink="#abcdef")
    assert "#abcdef" in svg and calibration_curve(np.array([80.0, -80.0]), np.array([True, False]))  # saturated
    with_gate = write_report(tmp_path, "t", gate=gate).read_text()
    without = write_report(tmp_path, "t", gate=(gate[0][:0], gate[1][:0])).read_text()
    assert "Calibration of the gate" in with_gate and "Calibration of the gate" not in without


def test_curves_are_repeatable_and_take_the_ink():
    assert training_curves(LOG) == training_curves(LOG)
    assert "#abcdef" in training_curves(LOG, ink="#abcdef")["Loss"]


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, "{:.1f}", "–"),
        (math.inf, "{:.2f}", "∞"),
        (26.687, "{:.2f}", "26.69"),
        (1.0, "%", "100.00 %"),
        (0.99999, "%", "99.99 %"),
        (0.0, "%", "0.00 %"),
        (1e-7, "%", "0.01 %"),
        (0.7594, "%", "75.94 %"),
    ],
)
def test_numbers_never_claim_more_than_they_hold(value, form, text):
    assert format_number(value, form) == text


def test_markdown_escapes_pipes():
    rows = {"a|b": image_metrics(picture(), picture())}
    lines = markdown(rows, "T").splitlines()
    assert lines[0] == "**T, whole picture**"
    assert lines[-1].startswith("| a\\|b | 0.0 | ∞ |")


def test_heat_map_scale_is_fixed():
    black = Image.new("RGB", (4, 1))
    other = Image.fromarray(np.array([[(0, 0, 0), (0, 1, 0), (0, 0, 64), (255, 0, 0)]], np.uint8))
    pixels = np.asarray(heat_map(black, other))[0]
    top = colormaps["inferno"](1.0, bytes=True)[:3]
    assert not pixels[0].any()
    assert pixels[1].max() > 40  # one level is visible
    assert (pixels[2] == top).all() and (pixels[3] == top).all()
    assert (np.asarray(heat_map(other, black)) == np.asarray(heat_map(black, other))).all()
    with pytest.raises(ValueError, match="one size"):
        heat_map(black, black.resize((2, 2)))


def test_heat_map_brightness_rises_with_every_level():
    ramp = Image.fromarray(np.repeat(np.arange(65, dtype=np.uint8)[None, :, None], 3, axis=2))
    brightness = np.asarray(heat_map(ramp, Image.new("RGB", ramp.size))).astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(brightness[0]) > -1).all() and brightness[0, -1] > 200
    colours = np.asarray(heat_map(ramp, Image.new("RGB", ramp.size)))[0]
    assert len(np.unique(colours, axis=0)) == 65


def test_heat_map_bar_leaves_the_map_alone():
    a, b = picture(2, (48, 240)), picture(3, (48, 240))
    plain, barred = np.asarray(heat_map(a, b)), np.asarray(heat_map(a, b, bar=True))
    assert barred.shape[0] > 48 and (barred[:48] == plain).all()
    assert heat_map(a.crop((0, 0, 10, 10)), b.crop((0, 0, 10, 10)), bar=True).width == 200


def test_red_overlay_touches_the_mask_only():
    image, mask = picture(), np.zeros((48, 64), bool)
    mask[5:9, 20:30] = True
    before, after = np.asarray(image), np.asarray(red_overlay(image, mask, opacity=0.5))
    assert (after[~mask] == before[~mask]).all()
    assert np.abs(after[mask] - (before[mask] / 2 + (127.5, 0, 0))).max() <= 0.5
    assert (np.asarray(red_overlay(image, mask, opacity=1))[mask] == (255, 0, 0)).all()
    with pytest.raises(ValueError, match=r"expected bool \(48, 64\)"):
        red_overlay(image, np.ones((6, 8), bool))


def test_mask_image_makes_blocks():
    grid = np.array([[True, False], [False, False]])
    pixels = np.asarray(mask_image(grid, (6, 4)))
    assert (pixels[:2, :3] == 255).all() and pixels.sum() == 255 * 6
    assert (np.asarray(mask_image(grid.ravel(), (6, 4))) == pixels).all()
    with pytest.raises(ValueError, match="N square"):
        mask_image(np.ones(5, bool), (6, 4))
    with pytest.raises(ValueError, match="int64"):
        mask_image(np.ones((2, 2), np.int64), (6, 4))


def test_sheet_places_pictures_in_rows_and_columns():
    red, blue = Image.new("RGB", (10, 10), "red"), Image.new("RGB", (20, 10), "blue")
    made = sheet([[(red, "one"), (blue, "two words " * 20)], [(blue, "")]], cell=100)
    pixels = np.asarray(made)
    assert made.width == 12 + 2 * 112
    assert (pixels[12:112, 12:112] == (255, 0, 0)).all()
    assert (pixels[12:62, 124:224] == (0, 0, 255)).all()
    assert (pixels[-12 - 54 : -12 - 4, 12:112] == (0, 0, 255)).all()
    assert (pixels[62:100, 124:224] < 100).any()  # its caption, which may not run out of its column
    assert (pixels[:, 224:] == 255).all()


def test_sheet_breaks_words_that_are_too_long():
    made = np.asarray(sheet([[(Image.new("RGB", (9, 9), "red"), "x" * 200)]], cell=64))
    assert (made[:, 76:] == 255).all()
    assert (made[90:] < 100).any()  # a later line has the rest
