"""Thinking at scale, through the real command: nothing done twice, the same thoughts for any number of processes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN_ROOT
from PIL import Image
from safetensors.torch import load_file

import thinkclearly
from thinkclearly import cli
from thinkclearly.data.thought_files import Prompt, read_decoded
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.editing.thoughts import think_prompts
from thinkclearly.images import ImageError

ROOT = GOLDEN_ROOT / "chameleon_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]
REPOSITORY = Path(__file__).parents[1]
PROMPTS = ["A kite.", "A boat.", "A red cup.", "Two hills."]
LENGTH = 300
SHORT = ThoughtSettings(max_length=LENGTH, max_pictures=2)


@pytest.fixture(scope="module")
def chameleon():
    return thinkclearly.load_model(str(ROOT / "checkpoint"))


@pytest.fixture(scope="module")
def values():
    return json.loads((ROOT / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def input_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def command(input_file, output, *more):
    flags = ["--model", ROOT / "checkpoint", "--input", input_file, "--output_dir", output, "--batch_size", 2]
    flags += ["--max_length", LENGTH, "--max_pictures", 2, *more]
    return [str(part) for part in (REPOSITORY / "scripts" / "think.py", *flags)]


def run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr


def files(folder):
    """Content of everything that a reader of thoughts reads."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name): (folder / name).read_bytes() for name in found if name.name != "run.json"}


@pytest.fixture(scope="module")
def one(input_file, tmp_path_factory):
    """The output of one process."""
    output = tmp_path_factory.mktemp("one") / "out"
    assert "4 thoughts, 4 new" in run([sys.executable, *command(input_file, output)])
    return output


def test_every_thought_has_a_folder_a_page_and_a_line(one):
    rows = read_decoded(one / "thoughts.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS and [row["sample_id"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        folder = one / str(row["sample_id"])
        assert (folder / "index.html").is_file() and json.loads((folder / "thought.json").read_text()) == row
        assert row["image_paths"] and all(
            Image.open(one / name).size == (row["size"],) * 2 for name in row["image_paths"]
        )
        assert len(row["pictures"]) == len(row["image_paths"]) and all(p["passes"] > 0 for p in row["pictures"])
        assert row["text"].endswith(row["answer"]) and row["answer"].startswith("<image_0>")
    decoded = [json.loads(line) for line in (one / "decoded_results.jsonl").read_text().splitlines()]
    assert decoded == [{name: row[name] for name in ("sample_id", "text", "image_paths")} for row in rows]
    answers = [json.loads(line) for line in (one / "answers.jsonl").read_text().splitlines()]
    assert answers == [{"prompt": row["prompt"], "response": row["ids"]} for row in rows]
    page = (one / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{k}/index.html"' in page for k in range(4))


def test_two_processes_think_what_one_does(input_file, one, tmp_path):
    launch = [Path(sys.executable).parent / "accelerate", "launch", "--cpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", *command(input_file, tmp_path / "out", "--batch_size", "1")]
    run([str(part) for part in launch])
    assert files(tmp_path / "out") == files(one)


def test_a_killed_command_goes_on_and_ends_where_one_that_was_not_killed_does(input_file, one, tmp_path):
    output = tmp_path / "out"
    started = [sys.executable, *command(input_file, output, "--batch_size", "1")]
    process = subprocess.Popen(started, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (output / "1").is_dir():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "thoughts.jsonl").exists()
    kept = {k: (output / str(k) / "thought.json").stat().st_mtime_ns for k in range(2)}
    run(started)
    assert kept == {k: (output / str(k) / "thought.json").stat().st_mtime_ns for k in range(2)}
    assert files(output) == files(one)


def think(editor, prompts, folder, settings=SHORT, **options):
    return think_prompts(editor, prompts, folder, settings, run={"model": "golden"}, **options)


def test_only_other_prompts_are_thought_anew(chameleon, tmp_path):
    prompts = list(map(Prompt, PROMPTS[:2]))
    assert think(chameleon, prompts, tmp_path, num_thoughts=2) == 4
    assert think(chameleon, prompts, tmp_path, num_thoughts=2) == 0
    before = files(tmp_path)
    assert think(chameleon, [prompts[0], Prompt("A red boat.")], tmp_path, num_thoughts=2) == 2
    after = files(tmp_path)
    assert {name for name in before if before[name] != after.get(name)} >= {"2/thought.json", "3/thought.json"}
    assert all(before[name] == after[name] for name in before if name[:2] in ("0/", "1/"))


def test_a_folder_that_is_no_thought_is_left_alone(chameleon, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "mine.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="has no thought.json. Give another --output_dir"):
        think(chameleon, [Prompt("A kite.")], tmp_path)
    assert (tmp_path / "0" / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ThoughtSettings(mode="subgoals")}, r"thinking.mode='critique' \(now 'subgoals'\)"),
        ({"settings": ThoughtSettings(preset="paper")}, "thinking.preset='repaired'"),
    ],
)
def test_another_way_to_think_is_refused_by_name(chameleon, tmp_path, options, message):
    think(chameleon, [Prompt("A kite.")], tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*Give another --output_dir"):
        think(chameleon, [Prompt("A kite.")], tmp_path, **options)


def test_answers_of_the_originals_inference_are_decoded_as_its_detokenizer_does(values, tmp_path):
    expected, runs = load_file(ROOT / "expected.safetensors"), values["runs"]
    malformed = values["detokenize_malformed"]
    records = [{"prompt": run["prompt"], "response": run["response"]} for run in runs.values()]
    records.append({"prompt": "Look", "response": malformed["response"]})
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "out"
    flags = ["--model", str(ROOT / "checkpoint"), "--input", str(tmp_path / "answers.jsonl")]
    cli.main(["think", *flags, "--output_dir", str(output)])
    rows = read_decoded(output / "decoded_results.jsonl")
    assert [row["text"] for row in rows] == [run["text"] for run in runs.values()] + [malformed["text"]]
    for number, (name, run) in enumerate(runs.items()):
        assert rows[number]["image_paths"] == [f"{number}/image_{k}.png" for k in range(len(run["image_files"]))]
        for k, path in enumerate(rows[number]["image_paths"]):
            if (key := f"run.{name}.image_{k}") in expected:
                picture = np.asarray(Image.open(output / path)).astype(int)
                assert np.abs(picture - expected[key].numpy()).max() <= 1
    number = len(runs)
    assert rows[number]["image_paths"] == [
        file and f"{number}/image_{k}.png" for k, file in enumerate(malformed["image_files"])
    ]
    assert "A picture that was not finished." in (output / str(number) / "index.html").read_text(encoding="utf-8")
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert answers == records


def test_a_prompts_picture_counts_and_a_replaced_one_is_thought_about_anew(chameleon, tmp_path):
    shutil.copy(ROOT / "images" / "square.png", tmp_path / "a.png")
    prompt, settings = (
        Prompt("<image>At night.", (tmp_path / "a.png",)),
        ThoughtSettings(mode="general", max_length=LENGTH),
    )
    output = tmp_path / "out"
    assert think(chameleon, [prompt], output, settings) == 1
    (row,) = read_decoded(output / "thoughts.jsonl")
    assert row["text"].startswith("<image_0>At night.") and "<image_0>" not in row["answer"]
    square = chameleon.processor.pixel_values([chameleon.processor.square(Image.open(tmp_path / "a.png"))])
    assert row["pictures"][0]["codes"] == chameleon.model.token_model.encode(square)[0].tolist()
    assert think(chameleon, [prompt], output, settings) == 0
    shutil.copy(ROOT / "images" / "small.png", tmp_path / "a.png")
    assert think(chameleon, [prompt], output, settings) == 1
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="a.png"):
        think(chameleon, [prompt], output, settings)


def test_a_model_without_a_stream_fills_such_a_folder_too(tmp_path, caplog):
    caplog.set_level("INFO")
    flags = ["--prompt", "A red circle.", "--num_thoughts", "2", "--output_dir", str(tmp_path / "out")]
    cli.main(["think", *flags])
    assert "2 thoughts, 2 new" in caplog.text
    rows = read_decoded(tmp_path / "out" / "thoughts.jsonl")
    assert [row["text"] for row in rows] == [f"A red circle.{row['answer']}" for row in rows]
    assert all(row["ids"] is None and row["answer"].startswith("<image_0>") for row in rows)
    assert rows[0]["answer"].endswith("<image_1>") and not (tmp_path / "out" / "answers.jsonl").exists()
    lines = tmp_path / "answers.jsonl"
    lines.write_text('{"prompt": "A kite.", "response": [0, 2]}\n')
    with pytest.raises(SystemExit):
        cli.main(["think", "--input", str(lines), "--output_dir", str(tmp_path / "other")])
    assert "only a Chameleon model reads" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --prompt"),
        (["--prompt", "x", "--input", "y"], "give either --prompt"),
        (["--prompt", "x", "--num_thoughts", "0"], "num_thoughts=0; expected 1 or more"),
        (["--prompt", "x", "--mode", "critic"], "mode='critic'; choose from general, critique, subgoals"),
        (["--prompt", "x", "--seed", "-1"], "seed=-1"),
    ],
)
def test_the_command_says_what_is_wrong(flags, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["think", *flags])
    assert message in capsys.readouterr().err


def test_a_bad_line_is_named_and_nothing_is_thought(input_file, tmp_path, caplog):
    path = tmp_path / "prompts.jsonl"
    path.write_text(input_file.read_text() + '{"prompt": 3}\n')
    with pytest.raises(SystemExit):
        cli.main(["think", "--input", str(path), "--output_dir", str(tmp_path / "out")])
    assert f"{path}:5: found" in caplog.text and not (tmp_path / "out").exists()
