"""What a run is: every option but those of the moment, and nothing that a checkpoint must not tell."""

import pytest
from datasets import Dataset

from thinkclearly.training.methods import parse_options
from thinkclearly.training.runs import MAY_CHANGE, RUN_FILE, check_unchanged, data_fingerprint, describe_run, read_run


def run_of(*argv):
    options, _ = parse_options(list(argv), "thinkclearly train")
    parts = options.model, options.lora, options.data, options.method
    return describe_run(options.training, parts, options.settings)


def test_a_run_is_read_back_as_it_was(tmp_path):
    run = run_of("--learning_rate", "3e-4", "--optim_args", "a=1", "--prefer", "exact", "--report_to", "none")
    assert read_run(tmp_path) is None
    (tmp_path / RUN_FILE).write_text(run.to_json())
    assert read_run(tmp_path) == run
    assert run.is_same(read_run(tmp_path)) and not run.is_same(run_of()) and not run.is_same(None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"options": {}}', '{"options": [], "fingerprints": 3}'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{RUN_FILE} does not tell what was trained"):
        read_run(tmp_path)


def test_a_record_tells_no_secret_and_no_folder(tmp_path):
    data = tmp_path / "mine" / "pairs"
    data.mkdir(parents=True)
    argv = ["--hub_token", "hf_secret", "--source", "folder", "--path", str(data), "--output_dir", str(tmp_path)]
    argv += ["--resume_from_checkpoint", str(tmp_path / "checkpoint-1"), "--base_model", str(tmp_path / "model")]
    text = run_of(*argv).to_json()
    assert "hf_secret" not in text and "mine" not in text and str(tmp_path) not in text
    assert '"path": "pairs"' in text and '"base_model": "model"' in text


def test_what_may_change_are_options():
    assert set(MAY_CHANGE) <= run_of().options.keys() | run_of("--method", "grpo").options.keys()
    assert len(set(MAY_CHANGE)) == len(MAY_CHANGE)


@pytest.mark.parametrize("follows", ["tune_clear_weight", "load_best_model_at_end"])
def test_evaluation_is_fixed_where_the_weights_follow_from_it(follows):
    steps = ["--eval_steps", "100", "--save_steps", "100"]
    check_unchanged(run_of(*steps), run_of(*steps, "--eval_steps", "50"), "here")
    steps += [f"--{follows}", "true"]
    with pytest.raises(ValueError, match="here was trained in another way:\n  eval_steps: 100, now 50\n"):
        check_unchanged(run_of(*steps), run_of(*steps, "--eval_steps", "50"), "here")


def test_an_option_that_is_new_in_a_library_is_no_difference():
    earlier = run_of()
    del earlier.options["weight_decay"]
    check_unchanged(earlier, run_of("--weight_decay", "0.1"), "here")


def test_a_fingerprint_is_of_the_content_in_its_order():
    rows = [{"key": str(i), "instruction": "x", "input_tokens": [i, 2], "output_tokens": [3, i]} for i in range(5)]
    whole = Dataset.from_list(rows)
    assert data_fingerprint(whole) == data_fingerprint(Dataset.from_list(rows[3:] + rows[:3]).select([2, 3, 4, 0, 1]))
    assert data_fingerprint(whole.select(range(4))) != data_fingerprint(whole)
    assert data_fingerprint(whole.select([1, 0, 2, 3, 4])) != data_fingerprint(whole)
    for name, value in (("key", "9"), ("instruction", "y"), ("input_tokens", [0, 3]), ("output_tokens", [3, 1])):
        assert data_fingerprint(Dataset.from_list([rows[0] | {name: value}, *rows[1:]])) != data_fingerprint(whole)
    assert data_fingerprint(whole.add_column("source", list("abcde"))) == data_fingerprint(whole)


def test_a_fingerprint_tells_which_record_shows_which_pictures_and_what_is_answered():
    rows = [
        {"key": "a", "instruction": "x", "input_tokens": [], "output_tokens": [1, 2], "answer": None},
        {"key": "b", "instruction": "y", "input_tokens": [3, 4, 5, 6], "output_tokens": [1, 2], "answer": None},
        {"key": "c", "instruction": "z", "input_tokens": [7, 8], "output_tokens": [], "answer": "A star."},
    ]
    found = {data_fingerprint(Dataset.from_list(rows))}
    moved = [rows[0] | {"input_tokens": [3, 4]}, rows[1] | {"input_tokens": [5, 6]}, rows[2]]
    found.add(data_fingerprint(Dataset.from_list(moved)))
    found.add(data_fingerprint(Dataset.from_list([*rows[:2], rows[2] | {"answer": "A circle."}])))
    assert len(found) == 3 and data_fingerprint(Dataset.from_list(rows)) in found


def test_fingerprints_of_checkpoints_that_earlier_versions_wrote_still_count():
    rows = [{"key": str(i), "instruction": "x", "input_tokens": [i, 2], "output_tokens": [3, i]} for i in range(2)]
    assert data_fingerprint(Dataset.from_list(rows)) == "9821409f16529f48"
