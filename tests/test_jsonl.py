import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thinkclearly.data.jsonl import FEATURES, read_jsonl, write_jsonl

K, N = 16, 4
GOOD = {"instruction": "make it red", "input_tokens": [0, 1, 2, 15], "output_tokens": ["<CLEAR>", 1, 2, 15]}

quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(tmp_path, content, **options):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_jsonl(path, K, N, **options)


def test_instruction_tokens_become_ids(tmp_path):
    dataset, skipped = read(tmp_path, json.dumps(GOOD))  # the last line needs no newline
    assert skipped == [] and dataset.features == FEATURES
    found = dataset.remove_columns("origins")[0]
    assert found == {"instruction": "make it red", "input_tokens": [0, 1, 2, 15], "output_tokens": [16, 1, 2, 15]}
    line = json.dumps({**GOOD, "output_tokens": ["<BLUR>", "<CLEAR>", 0, 0]})
    dataset, _ = read(tmp_path, line, names=("CLEAR", "BLUR"))
    assert dataset[0]["output_tokens"] == [17, 16, 0, 0]
    dataset, _ = read(tmp_path, b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n", names=("CLEAR", "BLUR"))
    assert len(dataset) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_tokens": [16, 1, 2, 3]}, r"'output_tokens'\[0\] is 16, expected 0 to 15 or <CLEAR>"),
        ({"output_tokens": [-1, 1, 2, 3]}, "is -1"),
        ({"output_tokens": ["<BLUR>", 1, 2, 3]}, "is '<BLUR>'"),
        ({"input_tokens": ["<CLEAR>", 1, 2, 3]}, "'input_tokens'.*expected 0 to 15"),
        ({"input_tokens": [1.0, 1, 2, 3]}, "is 1.0"),
        ({"input_tokens": [True, 1, 2, 3]}, "is True"),
        ({"input_tokens": [None, 1, 2, 3]}, "is None"),
        ({"input_tokens": [10**30, 1, 2, 3]}, "is 1000"),
        ({"input_tokens": [1, 2, 3]}, "3 tokens, expected a list of 4"),
        ({"output_tokens": [1, 2, 3, 4, 5]}, "5 tokens"),
        ({"output_tokens": "1 2 3 4"}, "expected a list"),
        ({"instruction": ""}, "'instruction' is ''"),
        ({"instruction": None}, "'instruction' is None"),
        ({"instruction": "\ud800"}, "surrogate"),
        ({"origins": "a"}, "'origins' is 'a', expected a list of names"),
        ({"origins": [1]}, r"'origins' is \[1\], expected a list of names"),
    ],
)
def test_bad_records_are_named(tmp_path, change, message):
    content = json.dumps(GOOD) + "\n" + json.dumps({**GOOD, **change}) + "\n"
    with pytest.raises(ValueError, match=rf"data\.jsonl:2: .*{message}"):
        read(tmp_path, content)
    dataset, skipped = read(tmp_path, content, on_bad_record="skip")
    assert len(dataset) == 1 and len(skipped) == 1 and "data.jsonl:2" in skipped[0]


def test_without_origins_the_codes_tell_what_is_the_same_picture(tmp_path):
    following = {**GOOD, "input_tokens": [0, 1, 2, 15], "output_tokens": [7, 7, 7, 7]}  # the target of GOOD
    dataset, _ = read(tmp_path, "\n".join(map(json.dumps, (GOOD, following))))
    assert dataset[0]["origins"][1] == dataset[1]["origins"][0] != dataset[1]["origins"][1]
    assert read(tmp_path, json.dumps({**GOOD, "origins": ["a"]}))[0]["origins"][:] == [["a"]]


def test_bad_files(tmp_path):
    good = json.dumps(GOOD).encode()
    with pytest.raises(ValueError, match=":2: .*cut short"):
        read(tmp_path, good + b"\n" + good[:40])
    with pytest.raises(ValueError, match=":1: not UTF-8"):
        read(tmp_path, b'{"instruction": "\xff"}\n')
    with pytest.raises(ValueError, match=":1: found list"):
        read(tmp_path, "[1, 2]\n")
    with pytest.raises(ValueError, match=":1: not a JSON"):
        read(tmp_path, "[" * 100_000)
    with pytest.raises(ValueError, match="no usable record"):
        read(tmp_path, "\n\n")
    with pytest.raises(ValueError, match="no usable record .1 bad"):
        read(tmp_path, "{}\n", on_bad_record="skip")
    with pytest.raises(ValueError, match="expected 'error' or 'skip'"):
        read(tmp_path, good, on_bad_record="ignore")


def test_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("old")
    rows = [{"instruction": "a", "input_tokens": [0] * N, "output_tokens": [K + 1] * N, "origins": []}]
    with pytest.raises(ValueError, match="record 0: 'output_tokens' holds 17, expected 0 to 16"):
        write_jsonl(Dataset.from_list(rows, features=FEATURES), path, K)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
codes = st.lists(st.integers(0, K - 1), min_size=N, max_size=N)
labels = st.lists(st.integers(0, K + 1), min_size=N, max_size=N)
origins = st.lists(text, min_size=1, max_size=3)


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"instruction": text, "input_tokens": codes, "output_tokens": labels, "origins": origins}
        ),
        min_size=1,
        max_size=5,
    )
)
@quick
def test_round_trip(tmp_path, rows):
    path = tmp_path / "round.jsonl"
    names = ("CLEAR", "BLUR")
    dataset = Dataset.from_list(rows, features=FEATURES)
    assert write_jsonl(dataset, path, K, names) == len(rows)
    again, skipped = read_jsonl(path, K, N, names=names)
    assert skipped == [] and again.to_list() == rows
    assert len(path.read_bytes().splitlines()) == len(rows)


@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.text(max_size=40).map(lambda t: json.dumps(t).encode()),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                lambda c: st.lists(c) | st.dictionaries(st.sampled_from(list(GOOD)), c),
                max_leaves=8,
            ).map(lambda v: json.dumps(v).encode()),
        ),
        max_size=6,
    )
)
@quick
def test_garbage_never_gets_in_and_never_hides_good_lines(tmp_path, lines):
    lines = [line.replace(b"\n", b" ") for line in lines]
    good = json.dumps(GOOD).encode()
    dataset, skipped = read(tmp_path, b"\n".join([good, *lines, good, b""]), on_bad_record="skip")
    assert len(dataset) == 2
    assert len(skipped) == sum(bool(line.strip()) for line in lines)
    assert np.array_equal(dataset["output_tokens"], [[16, 1, 2, 15]] * 2)
