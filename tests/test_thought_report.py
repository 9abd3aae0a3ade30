"""`thinkclearly prepare` shows what streams hold before they are trained on."""

import json

import pytest
from conftest import GOLDEN_ROOT
from PIL import Image

from thinkclearly import cli
from thinkclearly.data.interleaved import build_thoughts
from thinkclearly.data.options import DataArguments
from thinkclearly.data.thought_report import inspect_thoughts
from thinkclearly.models.load import load_checkpoint

BASE = GOLDEN_ROOT / "chameleon_tiny" / "checkpoint"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not BASE.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]


def test_prepare_counts_tokens_pictures_and_what_is_copied_and_says_what_was_too_long(tmp_path, caplog):
    options = ["--base_model", BASE, "--source", "shapes", "--limit", 6, "--eval_samples", 0, "--shapes_size", 64]
    options += [
        "--thought_mode",
        "critique",
        "subgoals",
        "--wrong_share",
        0.0,
        "--prepared_dir",
        tmp_path / "prepared",
    ]
    cli.main(["prepare", *map(str, options), "--output_dir", str(tmp_path / "look")])
    found = json.loads((tmp_path / "look" / "statistics.json").read_text())
    assert found["records"] == 6 and found["left_out"] == 0 and found["edits"] == 3 and found["clear_ratio"] == 1.0
    assert 9 + 6 <= found["pictures"] <= 12 + 6 and found["tokens"]["mean"] < found["tokens"]["most"]
    assert Image.open(tmp_path / "look" / "examples.png").height > 6 * 256
    most = found["tokens"]["most"]
    cli.main(["prepare", *map(str, options), "--output_dir", str(tmp_path / "less"), "--max_stream", str(most)])
    less = json.loads((tmp_path / "less" / "statistics.json").read_text())
    assert less["left_out"] >= 1 and less["records"] == 6 - less["left_out"] and less["tokens"]["most"] < most


def test_streams_of_words_alone_are_shown_too(tmp_path):
    (tmp_path / "thoughts.jsonl").write_text('{"prompt": "Which?", "response": "The tree."}\n')
    options = {"eval_samples": 0, "calibration_edits": 0, "prepared_dir": str(tmp_path)}
    data = DataArguments(source="thoughts", path=str(tmp_path / "thoughts.jsonl"), **options)
    checkpoint = load_checkpoint(str(BASE))
    found = inspect_thoughts(build_thoughts(data, checkpoint), checkpoint, tmp_path / "look")
    assert found["pictures"] == found["edits"] == 0 and found["clear_ratio"] is None
    assert (tmp_path / "look" / "examples.png").is_file()
