"""Benchmarks from the command line, on the shipped tiny model: what is edited, measured, averaged and kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCardData
from PIL import Image
from tiny_towers import save_clip, save_dino

import thinkclearly
from thinkclearly import cli
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.benchmarks import run as benchmark
from thinkclearly.evaluation.benchmarks.metrics import COLUMNS, distances, summarise
from thinkclearly.evaluation.benchmarks.report import eval_results

PHOTOS = tuple(packaged_photos("test"))
TURNS = {"30": 1, "139": 3, "7": 2}  # session → turns


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return ["--clip", save_clip(folder / "clip"), "--dino", save_dino(folder / "dino")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the shipped fine-tune, beside which results may be written."""
    return shutil.copytree(Path(thinkclearly.__file__).parent / "tiny_clear", tmp_path_factory.mktemp("m") / "model")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """MagicBrush's test archive in small: each turn's target is the next turn's source."""
    root = tmp_path_factory.mktemp("magicbrush") / "test"
    sessions, captions = {}, {}
    for session, turns in TURNS.items():
        folder = root / "images" / session
        folder.mkdir(parents=True)
        sessions[session], captions[session] = [], {}
        for turn in range(1, turns + 1):
            edit = random_edit(int(session), turn, PHOTOS)
            source, target, mask = edit.render(64, 64)
            name = f"{session}-output{turn - 1}.png" if turn > 1 else f"{session}-input.png"
            if turn == 1:
                source.save(folder / name)
            target.save(folder / f"{session}-output{turn}.png")
            mask.save(folder / f"{session}-mask{turn}.png")
            parts = {"input": name, "mask": f"{session}-mask{turn}.png", "output": f"{session}-output{turn}.png"}
            sessions[session].append(parts | {"instruction": edit.instruction})
            captions[session][parts["output"]] = "a star"
    (root / "edit_sessions.json").write_text(json.dumps(sessions))
    (root / "local_descriptions.json").write_text(json.dumps(captions))
    return root


@pytest.fixture(scope="module")
def pie(tmp_path_factory):
    """Two edits of PIE-Bench's size; everything of the second may change."""
    root = tmp_path_factory.mktemp("pie")
    (root / "annotation_images").mkdir()
    records = {}
    for number, mask in enumerate(([512 * 100, 512 * 200], [0, 512 * 512])):
        Image.open(PHOTOS[number]).convert("RGB").resize((512, 512)).save(root / f"annotation_images/{number}.png")
        records[f"00000000000{number}"] = {
            "image_path": f"{number}.png",
            "original_prompt": "a photo",
            "editing_prompt": "a [red] photo",
            "editing_instruction": "Make it red.",
            "mask": mask,
        }
    (root / "mapping_file.json").write_text(json.dumps(records))
    return root


def run(*argv):
    """Exit status of the command."""
    try:
        cli.main(["evaluate", "--benchmark", *(str(part) for part in argv)])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def whole(model, archive, towers, tmp_path_factory):
    """The output of MagicBrush, run once."""
    output = tmp_path_factory.mktemp("whole")
    assert run("magicbrush", "--model", model, "--path", archive, "--output_dir", output, *towers) == 0
    return output


@pytest.fixture
def output(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "out")


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def pixels(path):
    return Image.open(path).tobytes()


def test_magicbrush_as_its_authors_run_it(whole, model, archive):
    results = read(whole)
    single, multi = results["results"]["single-turn"], results["results"]["multi-turn"]
    assert list(single) == list(multi) == ["raw_model", "pixel_composite", "copy_source", "target"]
    assert {row["pictures"] for row in single.values()} == {sum(TURNS.values())}
    assert {row["pictures"] for row in multi.values()} == {len(TURNS)}
    assert results["left_out"] == 0 and results["run"]["split"] == "test"

    picture = {}  # every number again, from the files alone
    for session, turns in TURNS.items():
        for turn in range(1, turns + 1):
            picture[session, turn] = Image.open(archive / f"images/{session}/{session}-output{turn}.png")
        picture[session, 0] = Image.open(archive / f"images/{session}/{session}-input.png")
    for method in benchmark.METHODS:
        found = [
            distances(Image.open(whole / f"single-turn/{session}-{turn}/{method}.png"), picture[session, turn])
            for session, turns in TURNS.items()
            for turn in range(1, turns + 1)
        ]
        assert single[method]["l1"] == pytest.approx(np.mean([row["l1"] for row in found]))
        assert single[method]["l2"] == pytest.approx(np.mean([row["l2"] for row in found]))
        last = {"30": "single-turn/30-1", "139": "turn-3/139-3", "7": "turn-2/7-2"}
        last = {s: path if "single" in path else f"multi-turn/{method}/{path}" for s, path in last.items()}
        found = [
            distances(Image.open(whole / path / f"{method}.png"), picture[session, TURNS[session]])
            for session, path in last.items()
        ]
        assert multi[method]["l1"] == pytest.approx(np.mean([row["l1"] for row in found]))
        # A chain goes on from the method's own picture.
        chain = whole / f"multi-turn/{method}"
        assert pixels(chain / "turn-2/139-2/input_image.png") == pixels(whole / f"single-turn/139-1/{method}.png")
        assert pixels(chain / "turn-3/139-3/input_image.png") == pixels(chain / f"turn-2/139-2/{method}.png")
    masks = [np.asarray(Image.open(archive / f"images/139/139-mask{turn}.png")) > 127 for turn in (1, 2, 3)]
    line = next(line for line in map(json.loads, open(whole / "measured.jsonl")) if line.get("key") == "139")
    result = np.asarray(Image.open(whole / "multi-turn/raw_model/turn-3/139-3/raw_model.png"), float)
    squares = np.square(result - np.asarray(picture["139", 0], float))[~np.any(masks, axis=0)]
    assert line["rows"]["raw_model"]["mse_outside"] == pytest.approx(squares.mean())  # outside the union of masks
    copied = [distances(picture[session, 0], picture[session, turns])["l1"] for session, turns in TURNS.items()]
    assert multi["copy_source"]["l1"] == pytest.approx(np.mean(copied))
    assert single["copy_source"]["exact_outside"] == 1 and single["copy_source"]["l1"] > 0
    assert single["target"]["l1"] == 0 and single["target"]["dino"] == pytest.approx(1)
    assert all(row["clip_t"] is not None for row in multi.values())
    assert json.loads((model / "benchmarks/magicbrush.json").read_text()) == results


def test_pie_bench(model, pie, towers, tmp_path):
    output = tmp_path / "out"
    argv = ["pie-bench", "--model", model, "--path", pie, "--output_dir", output]
    assert run(*argv, *towers) == 0
    rows = read(output)["results"]["background"]
    assert list(rows) == ["raw_model", "pixel_composite", "copy_source"]
    assert all(row["pictures"] == 2 for row in rows.values())
    copy = rows["copy_source"]
    assert copy["mse"] == copy["structure"] == copy["mse_outside"] == 0 and copy["psnr"] == "inf"
    assert rows["raw_model"]["psnr"] > 0 and rows["raw_model"]["lpips"] is None
    lines = [json.loads(line) for line in (output / "measured.jsonl").read_text().splitlines()]
    assert [line["rows"]["raw_model"]["mse"] is None for line in lines[1:]] == [False, True]


def test_the_report_has_ours_copy_the_source_and_the_published_with_sources(whole):
    text = (whole / "results.md").read_text()
    for part in ("# MagicBrush, test", "| copy the source | 6 |", "| the target itself | 3 |", "## Multi-turn"):
        assert part in text
    assert "| NEP (autoregressive, human mask given) [NEP] |" in text and "- [NEP] NEP, arXiv 2508.06044" in text
    tables = text.split("## Multi-turn")[0]
    assert len({line.count("|") for line in tables.splitlines() if line.startswith("|")}) == 1


def test_a_killed_run_goes_on_and_other_towers_measure_anew(output, model, archive, towers, monkeypatch):
    argv = ["magicbrush", "--model", model, "--path", archive, "--output_dir", output, *towers]
    first, measured = read(output), output / "measured.jsonl"
    edits, looked, edit_many, magicbrush = [], [], Editor.edit_many, benchmark.metrics.magicbrush

    def count_edits(self, images, *args, **options):
        edits.extend(images)
        return edit_many(self, images, *args, **options)

    def count_items(batch, **options):
        looked.extend(batch)
        return magicbrush(batch, **options)

    monkeypatch.setattr(Editor, "edit_many", count_edits)
    monkeypatch.setattr(benchmark.metrics, "magicbrush", count_items)
    lines = measured.read_text().splitlines(keepends=True)
    measured.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote
    shutil.rmtree(output / "single-turn/30-1")
    assert run(*argv) == 0
    assert (len(edits), len(looked)) == (1, 1) and read(output) == first
    assert run(*argv[:-2], "--dino", "none") == 0
    assert (len(edits), len(looked)) == (1, 1 + 9)
    assert read(output)["results"]["single-turn"]["raw_model"]["dino"] is None
    assert "DINO" not in (output / "results.md").read_text().split("HIVE")[0]  # no column of dashes


def test_results_of_other_settings_do_not_mix(output, model, archive, caplog):
    argv = ["magicbrush", "--model", model, "--path", archive, "--output_dir", output]
    assert run(*argv, "--temperature", 0.5) == 1
    assert "holds results made with" in caplog.text and "temperature" in caplog.text


@pytest.mark.parametrize("changes", [{"edit": {"temperature": 0.5}}, {"clear_weight": 0.9}, {"gate_bias": 3.0}])
def test_results_of_another_gate_or_other_defaults_do_not_mix(output, model, archive, tmp_path, changes, caplog):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "clear_config.json").read_text())
    (other / "clear_config.json").write_text(json.dumps(config | changes))
    assert run("magicbrush", "--model", other, "--path", archive, "--output_dir", output) == 1
    assert f"clear_config.{list(changes)[0]}=" in caplog.text and "weights=" not in caplog.text


def test_pictures_that_were_edited_anew_are_measured_anew(output, model, archive, towers):
    before = read(output)["results"]
    for path in output.rglob("30-1/pixel_composite.png"):
        Image.new("RGB", Image.open(path).size).save(path)
    assert run("magicbrush", "--model", model, "--path", archive, "--output_dir", output, *towers) == 0
    for setting, rows in read(output)["results"].items():
        assert rows["pixel_composite"]["l1"] > before[setting]["pixel_composite"]["l1"]
        assert rows["raw_model"] == before[setting]["raw_model"]


def test_a_quantized_run_is_not_the_models_own_result(model, pie, towers, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    shared = model / "benchmarks/pie-bench.json"
    shared.unlink(missing_ok=True)
    argv = ["pie-bench", "--model", model, "--path", pie, *towers]
    assert run(*argv, "--output_dir", tmp_path / "small", "--load_in_8bit", "true") == 0 and not shared.exists()
    assert run(*argv, "--output_dir", tmp_path / "whole") == 0 and shared.exists()
    assert run(*argv, "--output_dir", tmp_path / "whole", "--load_in_8bit", "true") == 1
    assert "holds results made with" in caplog.text and "load_in_8bit=None (now True)" in caplog.text


def test_a_part_is_called_a_part_and_goes_on_no_card(output, model, archive):
    argv = ["magicbrush", "--model", model, "--path", archive, "--output_dir", output]
    before = read(model / "benchmarks", "magicbrush.json")
    assert run(*argv, "--limit", 2, "--clip", "none", "--dino", "none") == 0
    results = read(output)["results"]
    assert results["single-turn"]["raw_model"]["pictures"] == 4 and results["multi-turn"]["raw_model"]["pictures"] == 2
    assert "**A part only** (limit 2)" in (output / "results.md").read_text()
    assert read(model / "benchmarks", "magicbrush.json") == before


def test_a_bad_picture_stops_the_run_or_is_left_out_and_counted(archive, tmp_path, caplog):
    model = shutil.copytree(Path(thinkclearly.__file__).parent / "tiny_clear", tmp_path / "model")
    damaged = shutil.copytree(archive, tmp_path / "test")
    (damaged / "images/7/7-input.png").write_bytes(b"no picture")
    sessions = json.loads((damaged / "edit_sessions.json").read_text())
    sessions.pop("139")
    (damaged / "edit_sessions.json").write_text(json.dumps(sessions))
    argv = ["magicbrush", "--model", model, "--path", damaged, "--clip", "none", "--dino", "none"]
    assert run(*argv, "--output_dir", tmp_path / "stops") == 1
    assert "7-1" in caplog.text
    assert run(*argv, "--output_dir", tmp_path / "skips", "--on_bad_record", "skip") == 0
    results = read(tmp_path / "skips")
    assert results["left_out"] == 2  # the turn and its session
    assert results["results"]["single-turn"]["raw_model"]["pictures"] == 2
    assert results["results"]["multi-turn"]["raw_model"]["pictures"] == 1
    assert "**2 items are left out**" in (tmp_path / "skips/results.md").read_text()
    assert not (model / "benchmarks").exists()


def test_numbers_reach_a_model_card():
    rows = {"pixel_composite": summarise([{"mse": 0.0, "ssim": 100.0}]), "copy_source": summarise([{"mse": 0.0}])}
    run_of = {"benchmark": "pie-bench", "split": "all", "model": "x"}
    found = eval_results({"run": run_of, "results": {"background": rows}})
    assert [result.metric_type for result in found] == ["mse", "ssim", "mse"]  # PSNR is infinite
    assert [result.metric_value for result in found] == [0, 100, 0]
    card = ModelCardData(model_name="x", eval_results=found).to_dict()
    (entry,) = card["model-index"][0]["results"]
    assert entry["dataset"] == {"type": "PIE-Bench", "name": "PIE-Bench", "config": "background", "split": "all"}
    names = [metric["name"] for metric in entry["metrics"]]
    assert names == ["MSE ×10⁴, pixel composite", "SSIM ×10², pixel composite", "MSE ×10⁴, copy the source"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["emu"], "benchmark='emu'; choose from magicbrush, pie-bench"),
        (["pie-bench"], "pie-bench needs --path"),
        (["magicbrush", "--limit", "0"], "limit=0; expected 1 or more"),
    ],
)
def test_mistakes_are_named(argv, message, capsys):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_every_column_has_a_heading_that_says_what_is_better():
    for columns in COLUMNS.values():
        assert all(heading[-1] in "↑↓" or key == "exact_outside" for key, (heading, _) in columns.items())
