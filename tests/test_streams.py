"""A batch of streams says what every position predicts, and rows of guidance are trained on what the sampler shows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from thinkclearly.data.streams import StreamCollator, StreamDropout
from thinkclearly.instructions import InstructionVocabulary

N, CODES, BOI, EOI, BOS, EOS, SEP, PAD = 4, 6, 90, 91, 80, 81, 82, 83
CODE_IDS = [15, 11, 14, 10, 13, 12]  # not in order, as in a real vocabulary
PROCESSOR = SimpleNamespace(num_image_tokens=N, code_ids=CODE_IDS, pad_id=PAD)
WITH, WITHOUT = InstructionVocabulary(CODES, ("CLEAR",)), InstructionVocabulary(CODES, ())


def picture(*codes):
    return [BOI, *(CODE_IDS[code] for code in codes), EOI]


def record(key="a", pictures=((0, 1, 2, 3), (0, 1, 5, 4)), edit_of=(-1, 0), copied=(1, 1, 0, 0)):
    """BOS 60 61 SEP, pictures with a word 70 + i after each, EOS."""
    ids, starts = [BOS, 60, 61, SEP], []
    for i, codes in enumerate(pictures):
        starts.append(len(ids) + 1)
        ids += [*picture(*codes), 70 + i]
    return {
        "key": key,
        "input_ids": [*ids, EOS],
        "prompt_ids": [61],
        "response_start": 4,
        "picture_starts": starts,
        "edit_of": list(edit_of),
        "copied": [False] * N + [bool(c) for c in copied] if pictures else [],
    }


def predicted(batch, row):
    """Id or class that each position of a row is to predict, by position."""
    chosen = batch["word_rows"] == row
    found = dict(zip(batch["word_columns"][chosen].tolist(), batch["word_labels"][chosen].tolist()))
    for r, start, labels in zip(*(batch[f"edit_{name}"].tolist() for name in ("rows", "columns", "labels"))):
        if r == row:
            assert not found.keys() & set(range(start - 1, start - 1 + N))
            found |= {start - 1 + i: f"class {label}" for i, label in enumerate(labels)}
    return found


def test_every_position_of_the_response_predicts_the_next_id_and_the_prompt_nothing():
    rows = [record(), record("b", pictures=(), edit_of=())]
    batch = StreamCollator(PROCESSOR, WITHOUT)(rows)
    assert batch["input_ids"].shape == (2, 19)
    for k, row in enumerate(rows):
        ids = row["input_ids"]
        assert batch["input_ids"][k].tolist() == ids + [PAD] * (19 - len(ids))
        assert batch["attention_mask"][k].tolist() == [1] * len(ids) + [0] * (19 - len(ids))
        assert predicted(batch, k) == {i - 1: ids[i] for i in range(4, len(ids))}
    assert batch["picture_rows"].tolist() == [0, 0] and batch["picture_columns"].tolist() == [5, 12]
    assert batch["picture_codes"].tolist() == [[0, 1, 2, 3], [0, 1, 5, 4]]
    assert batch["edit_labels"].shape == (0, N) and batch["edit_rows"].shape == (0,)


def test_edited_pictures_have_classes_where_there_are_instruction_tokens():
    batch = StreamCollator(PROCESSOR, WITH)([record("b", pictures=(), edit_of=()), record()])
    plain = predicted(StreamCollator(PROCESSOR, WITHOUT)([record()]), 0)
    classes = {11: f"class {CODES}", 12: f"class {CODES}", 13: "class 5", 14: "class 4"}
    assert predicted(batch, 1) == plain | classes
    assert batch["edit_rows"].tolist() == [1] and batch["edit_columns"].tolist() == [12]
    assert batch["picture_codes"].tolist() == [[0, 1, 2, 3], [0, 1, 5, 4]], "the reconstruction is of all pictures"


@pytest.mark.parametrize("vocabulary", [WITH, WITHOUT])
def test_the_uncond_row_is_one_picture_after_boi(vocabulary):
    collate, seen = StreamCollator(PROCESSOR, vocabulary, StreamDropout(drop_all=1.0, seed=1)), set()
    for key in map(str, range(20)):
        batch = collate([record(key)])
        ids = tuple(batch["input_ids"][0].tolist())
        assert ids in (tuple(picture(0, 1, 2, 3)), tuple(picture(0, 1, 5, 4)))
        seen.add(ids)
        assert predicted(batch, 0) == {i: ids[i + 1] for i in range(N)}, "without its source nothing is an edit"
        assert batch["picture_columns"].tolist() == [1] and batch["edit_labels"].shape == (0, N)
    assert len(seen) == 2


def test_the_prompt_row_is_the_bare_prompt_and_the_last_picture():
    batch = StreamCollator(PROCESSOR, WITH, StreamDropout(drop_context=1.0))([record()])
    assert batch["input_ids"][0].tolist() == [61, *picture(0, 1, 5, 4)]
    assert predicted(batch, 0) == {1 + i: batch["input_ids"][0, 2 + i].item() for i in range(N)}
    assert batch["picture_columns"].tolist() == [2]


def test_the_pictures_row_is_all_pictures_and_edits_stay_edits():
    batch = StreamCollator(PROCESSOR, WITH, StreamDropout(drop_words=1.0))([record()])
    assert batch["input_ids"][0].tolist() == picture(0, 1, 2, 3) + picture(0, 1, 5, 4)
    first = {i: CODE_IDS[i] for i in range(N)}
    assert predicted(batch, 0) == first | {6: "class 6", 7: "class 6", 8: "class 5", 9: "class 4"}
    assert batch["picture_columns"].tolist() == [1, 7]


@pytest.mark.parametrize("vocabulary", [WITH, WITHOUT])
def test_given_pictures_are_read_and_not_taught(vocabulary):
    given = record() | {"response_start": 4 + N + 2}  # the first picture, with BOI and EOI
    whole = StreamCollator(PROCESSOR, vocabulary)([given])
    assert whole["input_ids"].tolist() == StreamCollator(PROCESSOR, vocabulary)([record()])["input_ids"].tolist()
    assert min(predicted(whole, 0)) == 4 + N + 1 and whole["picture_codes"].tolist() == [[0, 1, 5, 4]]
    for key in map(str, range(9)):
        one = StreamCollator(PROCESSOR, vocabulary, StreamDropout(drop_all=1.0))([given | {"key": key}])
        assert one["input_ids"][0].tolist() == picture(0, 1, 5, 4)
    both = StreamCollator(PROCESSOR, vocabulary, StreamDropout(drop_words=1.0))([given])
    assert both["input_ids"][0].tolist() == picture(0, 1, 2, 3) + picture(0, 1, 5, 4)
    assert min(predicted(both, 0)) == N + 2 and both["picture_columns"].tolist() == [7]


def test_shares_are_kept_and_depend_on_record_and_epoch_alone():
    dropout = StreamDropout(drop_all=0.2, drop_context=0.1, drop_words=0.3, seed=4)
    collate, rows = StreamCollator(PROCESSOR, WITH, dropout), [record(str(k)) for k in range(600)]
    kinds = {6: "uncond", 7: "prompt", 12: "pictures", 19: "full"}

    def shown(rows):
        return [kinds[int(length)] for length in collate(rows)["attention_mask"].sum(1)]

    found = shown(rows)
    for kind, share in {"uncond": 0.2, "prompt": 0.1, "pictures": 0.3, "full": 0.4}.items():
        assert np.mean([each == kind for each in found]) == pytest.approx(share, abs=0.06), kind
    assert shown(rows[7:9]) == found[7:9]
    collate.epoch.fill_(1)
    assert shown(rows) != found
    words = [record(str(k), pictures=(), edit_of=()) for k in range(9)]
    assert collate(words)["attention_mask"].sum(1).tolist() == [5] * 9, "records without pictures are shown whole"
    evaluation = collate.without_dropout()
    assert evaluation(rows[:9])["attention_mask"].sum(1).tolist() == [19] * 9


def test_other_instruction_tokens_are_refused():
    vocabulary = SimpleNamespace(names=("CLEAR", "BLUR"))
    with pytest.raises(ValueError, match="token streams know CLEAR alone"):
        StreamCollator(PROCESSOR, vocabulary)


def test_all_tensors_are_long():
    assert {value.dtype for value in StreamCollator(PROCESSOR, WITH)([record()]).values()} == {torch.int64}
