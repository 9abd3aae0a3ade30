"""The demo at its smallest, in process; whole in test_end_to_end."""

import json

import pytest

from thinkclearly import demo


def test_without_photographs_the_report_has_the_held_out_edits_alone(tmp_path):
    options = {"output_dir": tmp_path, "limit": 4, "eval_samples": 2, "max_steps": 1, "calibration_edits": 0}
    options |= {"sample_edits": 0, "demo_edits": 2, "demo_photo_edits": 0}
    demo.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["held_out"]["edits"] == 2 and "photographs" not in metrics
    assert (tmp_path / "edits" / "0001").is_dir() and not (tmp_path / "photographs").exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 held-out edits" in page and "Whole photographs" not in page


@pytest.mark.parametrize(("flag", "least"), [("demo_edits", 1), ("demo_photo_edits", 0), ("demo_batch_size", 1)])
def test_too_few_are_refused_before_training(flag, least, capsys):
    with pytest.raises(SystemExit):
        demo.main([f"--{flag}", str(least - 1)])
    assert f"{flag}={least - 1}; expected {least} or more" in capsys.readouterr().err
