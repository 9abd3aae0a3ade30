import pickle

import numpy as np
import pytest
import torch

from thinkclearly.data import sources
from thinkclearly.data.collator import Collator
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.data.sources import BadRecord, read_example
from thinkclearly.images import Letterbox
from thinkclearly.instructions import InstructionVocabulary
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.load import load_checkpoint
from thinkclearly.sequence import FULL, NO_SOURCE, UNCOND, Dropout, drawing, named_row

K, N = 128, 36


@pytest.fixture(scope="module")
def checkpoint(golden):
    return load_checkpoint(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        return sources.shapes(6, 48, seed=3)


@pytest.fixture(scope="module")
def rows(photos, checkpoint, tmp_path_factory):
    return prepare_dataset(photos, checkpoint, tmp_path_factory.mktemp("prepared")).to_list()


@pytest.fixture
def collator(checkpoint):
    def make(drop_all=0.0, drop_source=0.0, seed=0, **kwargs):
        dropout = Dropout(drop_all, drop_source, seed)
        return Collator(checkpoint.processor, InstructionVocabulary(K), dropout, **kwargs)

    return make


def tokens(rows, name):
    return torch.tensor([row[name] for row in rows])


def test_full_rows_are_the_prompts_of_inference(rows, checkpoint, collator):
    batch = collator()(rows)
    shown = [named_row(drawing(row["instruction"], [i]), FULL) for i, row in enumerate(rows)]
    prompt = checkpoint.processor.rows(shown, outputs=True)
    for name, value in vars(prompt).items():
        assert torch.equal(batch[name], value), name
    assert torch.equal(batch["source_tokens"], tokens(rows, "input_tokens"))
    assert torch.equal(batch["labels"], tokens(rows, "output_tokens"))
    assert batch["labels"].dtype == batch["source_tokens"].dtype == torch.long


def test_left_padding(rows, checkpoint, collator):
    rows = [{**rows[0], "instruction": "Go."}, {**rows[1], "instruction": "Make the blue circle at the top purple."}]
    batch = collator()(rows)
    mask = batch["attention_mask"]
    assert mask[0, 0] == 0 and mask[1].all() and (mask.diff() >= 0).all() and mask[:, -1].all()
    assert (batch["input_ids"][mask == 0] == checkpoint.processor.pad_id).all()
    alone = collator()(rows[:1])
    padding = int((mask[0] == 0).sum())
    assert torch.equal(batch["input_ids"][0, padding:], alone["input_ids"][0])
    assert batch["seen_slots"][0] == alone["seen_slots"][0] + padding
    for i in range(2):
        for slot, id_ in (("seen_slots", checkpoint.processor.image_id), ("known_slots", checkpoint.processor.pad_id)):
            start = int(batch[slot][i, 0])
            assert (batch["input_ids"][i, start : start + N] == id_).all()


def test_rows_without_source_have_no_codes_but_keep_their_labels(rows, collator):
    batch, full = collator(drop_source=1.0)(rows), collator()(rows)
    assert (batch["known_slots"] == -1).all()
    for name in ("input_ids", "seen_slots", "labels", "source_tokens", "pixel_values"):
        assert torch.equal(batch[name], full[name])
    assert (batch["labels"] == K).any()


def test_uncond_rows_are_told_nothing(rows, checkpoint, collator):
    processor = checkpoint.processor
    batch = collator(drop_all=1.0, drop_source=1.0)(rows)
    assert (batch["seen_slots"] == -1).all() and (batch["known_slots"] == -1).all()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        seen = ids[mask == 1][: 1 - N].tolist()  # what is drawn comes after the BOI
        assert seen[0] == processor.bos_id and seen[-1] == processor.boi_id
        assert set(seen[1:-1]) == {processor.pad_id}
    labels, source, given = batch["labels"], batch["source_tokens"], tokens(rows, "output_tokens")
    assert torch.equal(labels, torch.where(given == K, source, given))
    assert (labels < K).all()


def test_pictures_are_those_of_inference(photos, rows, checkpoint, collator):
    pictures = [read_example(row).source for row in photos]
    squares = [Letterbox(*p.size, checkpoint.processor.image_size).fit(p) for p in pictures]
    assert torch.equal(collator()(rows)["pixel_values"], checkpoint.processor.pixel_values(squares))


def test_rows_without_pictures(rows, collator):
    bare = [{name: row[name] for name in ("key", "instruction", "input_tokens", "output_tokens")} for row in rows]
    assert "pixel_values" not in collator()(bare)
    with pytest.raises(BadRecord, match=rf"^{rows[0]['key'].replace('[', '.')[:-1]}.: no source picture, while other"):
        collator()(bare[:1] + rows[1:])


def test_a_broken_picture_is_named(rows, collator, tmp_path):
    for source in ({"bytes": b"junk", "path": None}, {"bytes": None, "path": str(tmp_path / "gone.png")}):
        with pytest.raises(BadRecord, match=r"shapes\[3:1\]: source"):
            collator()([rows[0], {**rows[1], "source": source}])


# Dropout

KEYS = [f"data[{i}]" for i in range(4000)]
EDIT = drawing("Make it blue.", [0])
NAMES = {named_row(EDIT, name): name for name in (FULL, NO_SOURCE, UNCOND)}


def condition(collate, key):
    """The name of the row that a record shows in the epoch that the collator is in."""
    return NAMES[collate.dropout.row(EDIT, key, int(collate.epoch))]


def test_shares(collator):
    drops = np.array([condition(collator(0.1, 0.5), key) for key in KEYS])
    assert np.mean(drops == UNCOND) == pytest.approx(0.1, abs=0.02)
    assert np.mean(drops == NO_SOURCE) == pytest.approx(0.45, abs=0.03)
    assert {condition(collator(), key) for key in KEYS[:100]} == {FULL}


def test_conditions_depend_on_key_epoch_and_seed_alone(collator):
    first, again, other = collator(0.2, 0.5), collator(0.2, 0.5), collator(0.2, 0.5, seed=1)
    drops = [condition(first, key) for key in KEYS[:200]]
    assert drops == [condition(again, key) for key in reversed(KEYS[:200])][::-1]
    assert drops != [condition(other, key) for key in KEYS[:200]]
    first.epoch.fill_(1)
    later = [condition(first, key) for key in KEYS[:200]]
    assert 60 < sum(a != b for a, b in zip(drops, later)) < 160


def test_a_row_is_the_same_in_any_batch(rows, collator):
    collates = (collator(0.3, 0.5, seed=seed) for seed in range(50))
    collate = next(c for c in collates if len({condition(c, row["key"]) for row in rows}) == 3)
    together = collate(rows)
    for i, row in enumerate(rows):
        alone = collate([row])
        assert torch.equal(alone["labels"][0], together["labels"][i])
        seen = together["input_ids"][i][together["attention_mask"][i] == 1]
        assert torch.equal(alone["input_ids"][0], seen)
        assert (alone["known_slots"][0, 0] >= 0) == (together["known_slots"][i, 0] >= 0)


def test_workers_see_the_epoch(collator):
    collate = collator(0.2, 0.5)
    loader = torch.utils.data.DataLoader(
        KEYS[:8], batch_size=8, num_workers=1, collate_fn=lambda keys: [condition(collate, key) for key in keys],
        persistent_workers=True,
    )  # fmt: skip
    seen = [next(iter(loader))]
    collate.epoch.fill_(5)
    seen.append(next(iter(loader)))
    assert seen[1] == [condition(collate, key) for key in KEYS[:8]] != seen[0]


def test_collator_can_be_pickled(rows, collator):
    collate = collator(0.3, 0.5)
    copy = pickle.loads(pickle.dumps(collate))
    assert torch.equal(copy(rows)["labels"], collate(rows)["labels"])


def test_the_model_takes_the_batch(rows, checkpoint, collator):
    model = InstructionModel(checkpoint.network, ClearConfig(K)).eval()
    collate = collator(0.3, 0.5, seed=3)
    with torch.no_grad():
        logits = model.teacher_forced_logits(**collate(rows))
        bare = model.teacher_forced_logits(**collate([{**row, "source": None} for row in rows]))
    assert logits.shape == bare.shape == (len(rows), N, K + 1)
    assert torch.isfinite(logits).all() and torch.isfinite(bare).all()
