"""PairComp: pairs drawn twice each, scored by a model that is asked, and summed up as its authors do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN_ROOT
from PIL import Image
from tiny_judges import save_internvl

import thinkclearly
from thinkclearly import cli
from thinkclearly.data.sources import BadRecord
from thinkclearly.evaluation.benchmarks import drawing, drawn, paircomp
from thinkclearly.evaluation.benchmarks.paircomp import Pair, read_pairs, read_scores, summarise
from thinkclearly.evaluation.benchmarks.report import eval_results
from thinkclearly.evaluation.benchmarks.vqa import VqaScorer

GOLDEN = GOLDEN_ROOT / "focusdiff_tiny"
CAPTIONS = [
    ("Color difference", "a red circle at the top", "a blue circle at the top"),
    ("Style & Tone difference", "a green star at the center", "a white star at the center “on ice”"),
    ("Color difference", "a black square at the left", "a purple square at the left"),
]


# ---- files and means ---------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")
def test_every_category_and_the_average_are_the_originals():
    expected = json.loads((GOLDEN / "values.json").read_text(encoding="utf-8"))["paircomp"]
    pairs = read_pairs(GOLDEN / "paircomp" / "prompts.json")
    assert summarise(pairs, read_scores(GOLDEN / "paircomp" / "scores.json")) == expected


def test_a_category_is_the_mean_of_its_pairs_and_the_average_that_of_the_categories():
    pairs = [Pair("Color", ("a", "b")), Pair("Color", ("c", "d")), Pair("Text", ("e", "f"))]
    found = summarise(pairs, {0: [0.5, 0.5, 0.5, 0.5], 1: [1.0, 1.0, 1.0, 0.0], 2: [0.0625, 1.0, 1.0, 1.0]})
    assert list(found) == ["Color", "Text", "Average"]
    assert found["Color"] == {"arithmetic": 0.625, "geometric": 0.25}  # one picture at 0 makes its pair's 0
    assert found["Text"] == {"arithmetic": 0.765625, "geometric": 0.5}
    assert found["Average"] == {"arithmetic": (0.625 + 0.765625) / 2, "geometric": 0.375}


def test_scores_of_other_prompts_are_refused():
    with pytest.raises(ValueError, match="pair 1, but there are 1 pairs"):
        summarise([Pair("Color", ("a", "b"))], {1: [1.0]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"category": "Smell difference", "caption1": "a", "caption2": "b"}], "pair 0: the category is 'Smell"),
        ([{"category": "Color difference", "caption1": "a"}], "pair 0 is .*expected an object with category"),
        ([["a", "b"]], "pair 0 is"),
        ([], "holds no pair"),
        ({}, "expected an array"),
    ],
)
def test_a_bad_prompt_file_is_named(content, message, tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps(content))
    with pytest.raises((BadRecord, ValueError), match=message):
        read_pairs(tmp_path / "pairs.json")


def test_scores_of_another_form_are_named(tmp_path):
    (tmp_path / "scores.json").write_text('{"0": [{"value": 1}]}')
    with pytest.raises(BadRecord, match="pair 0 is .*expected a list of objects with pair_idx"):
        read_scores(tmp_path / "scores.json")


# ---- the whole benchmark, on the tiny model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return save_internvl(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "PairComp.json"
    records = [dict(zip(("category", "caption1", "caption2"), pair)) for pair in CAPTIONS]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the shipped fine-tune, beside which results may be written; it samples."""
    shipped = Path(thinkclearly.__file__).parent / "tiny_clear"
    folder = shutil.copytree(shipped, tmp_path_factory.mktemp("m") / "model")
    config = json.loads((folder / "clear_config.json").read_text())
    config["edit"] |= {"temperature": 1.0}
    (folder / "clear_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def argv(prompts, scorer, model):
    return ["--path", prompts, "--scorer", scorer, "--model", model, "--batch_size", 4]


def run(*argv):
    """Exit status of the command."""
    try:
        cli.main(["evaluate", "--benchmark", "paircomp", *(str(part) for part in argv)])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert run(*argv, "--output_dir", output) == 0
    return output


@pytest.fixture
def output(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def pixels(folder):
    return {path.name: np.array(Image.open(path), int) for path in sorted((folder / "pictures").glob("*.png"))}


def differing(found, expected):
    """Names of the pictures that differ by more than the level that a batch may decide."""
    return {name for name, picture in found.items() if np.abs(picture - expected[name]).max() > 1}


def test_two_pictures_of_each_caption_under_the_authors_names(whole):
    names = {f"{pair}_{i}_{k}.png" for pair in range(3) for i in range(2) for k in range(2)}
    drawn_pictures = pixels(whole)
    assert drawn_pictures.keys() == names
    assert len({picture.tobytes() for picture in drawn_pictures.values()}) == len(
        names
    )  # no two of them share their noise
    assert Image.open(whole / "pictures" / "1_1_0.png").info["prompt"] == CAPTIONS[1][2]


def test_results_are_the_scorers_scores_of_the_pictures_with_their_captions(whole, scorer):
    judge = VqaScorer(
        scorer, "cpu", question=' Does this image match the description "{}", please directly respond with yes or no'
    )
    pictures = {path.name: Image.open(path).convert("RGB") for path in (whole / "pictures").glob("*.png")}
    scores = {}
    for pair, (_, *captions) in enumerate(CAPTIONS):
        shown = [pictures[f"{pair}_{i}_{k}.png"] for i in range(2) for k in range(2)]
        scores[pair] = judge.score([captions[0]] * 2 + [captions[1]] * 2, shown)
    saved = read_scores(whole / "pictures" / "scores.json")
    assert saved == {pair: pytest.approx(row, abs=1e-5) for pair, row in scores.items()}
    results = read(whole)["results"]
    color = np.mean([np.mean(scores[0]), np.mean(scores[2])])
    arithmetic = results["arithmetic mean"]["model"]
    assert arithmetic["Color"] == pytest.approx(100 * color, abs=1e-3) and arithmetic["pictures"] == 12
    assert arithmetic["Average"] == pytest.approx(50 * (color + np.mean(scores[1])), abs=1e-3)
    geometric = np.prod(scores[1]) ** 0.25
    assert results["geometric mean"]["model"]["Style & Tone"] == pytest.approx(100 * geometric, abs=1e-3)


def test_the_report_has_ours_and_the_published_with_sources(whole):
    text = (whole / "results.md").read_text()
    assert "# PairComp" in text and "| this model | 12 |" in text and "| Janus-Pro-7B [FD] |" in text
    assert "2 pictures a prompt, seed 0, guidance 2, temperature 1, top_k all, top_p 1." in text
    assert "the published rows were scored by InternVL2.5-26B" in text


def test_a_killed_run_goes_on_and_draws_and_scores_only_what_is_missing(output, argv, monkeypatch):
    first, before, calls = read(output), pixels(output), {"drawn": [], "scored": []}
    draw, score = drawing.draw_numbered, VqaScorer.score

    def counting_draw(model, processor, words, *rest):
        calls["drawn"] += words
        return draw(model, processor, words, *rest)

    def counting_score(self, texts, pictures):
        calls["scored"] += texts
        return score(self, texts, pictures)

    monkeypatch.setattr(drawing, "draw_numbered", counting_draw)
    monkeypatch.setattr(VqaScorer, "score", counting_score)
    (output / "pictures" / "0_1_1.png").unlink()
    (output / "pictures" / "2_0_0.png").write_bytes((output / "pictures" / "2_0_0.png").read_bytes()[:40])
    lines = (output / "measured.jsonl").read_text().splitlines(keepends=True)
    (output / "measured.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    assert run(*argv, "--output_dir", output) == 0
    assert calls["drawn"] == [1, 4] and set(calls["scored"]) == {CAPTIONS[2][2]}
    assert not differing(pixels(output), before) and len(pixels(output)) == 12  # the same noise: the same pictures
    assert read(output)["results"]["geometric mean"]["model"] == pytest.approx(
        first["results"]["geometric mean"]["model"], abs=0.1
    )


def test_a_caption_that_was_changed_is_drawn_and_scored_anew(output, argv, prompts, tmp_path):
    records = json.loads(prompts.read_text())
    records[0]["caption1"] = "a yellow triangle at the bottom"
    prompts_now = shutil.copytree(prompts.parent, tmp_path / "prompts") / prompts.name
    prompts_now.write_text(json.dumps(records))
    before = pixels(output)
    (output / "pictures" / "run.json").unlink()  # the path is part of the run
    assert run("--path", prompts_now, *argv[2:], "--output_dir", output) == 0
    assert differing(pixels(output), before) == {"0_0_0.png", "0_0_1.png"}


def test_pictures_do_not_depend_on_what_is_drawn_beside_them(whole, argv, tmp_path):
    assert run(*argv, "--batch_size", 2, "--limit", 2, "--output_dir", tmp_path) == 0
    assert len(pixels(tmp_path)) == 8 and not differing(pixels(tmp_path), pixels(whole))
    assert "**A part only** (limit 2)" in (tmp_path / "results.md").read_text()


def test_other_settings_need_another_folder(output, argv, caplog):
    assert run(*argv, "--output_dir", output, "--cfg_weight", 3) == 1
    assert "holds results made with" in caplog.text and "cfg_weight" in caplog.text


def test_the_fine_tunes_own_result_reaches_its_card_and_no_other_does(output, model, argv, tmp_path, caplog):
    assert run(*argv, "--output_dir", output) == 0
    assert read(model / "benchmarks", "paircomp.json") == read(output)
    found = eval_results(read(output))
    assert {result.task_type for result in found} == {"text-to-image"}
    assert "Average, this model" in {result.metric_name for result in found}
    (model / "benchmarks" / "paircomp.json").unlink()
    assert run(*argv, "--output_dir", tmp_path / "other", "--temperature", 0, "--limit", 1) == 0
    assert not (model / "benchmarks" / "paircomp.json").exists()
    assert "all pictures of a prompt are the same" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "paircomp needs --path"), (["--path", "x", "--num_images", "0"], "num_images=0; expected 1 or more")],
)
def test_mistakes_are_named(flags, message, capsys):
    assert run(*flags) == 2
    assert message in capsys.readouterr().err


def test_each_benchmark_has_an_instrument():
    assert drawn.NUM_IMAGES.keys() == drawn.JUDGES.keys() and set(paircomp.COLUMNS) > {"Average"}
