"""Features from disk train as the tower's own do, are computed once, and are never taken for another tower's."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from tiny_runs import fresh, history, make_trainer, records, trained

from thinkclearly import cli
from thinkclearly.data import features
from thinkclearly.data.collator import Collator
from thinkclearly.data.sources import BadRecord

COLUMNS = {"key": Value("string"), "instruction": Value("string"), "source": Image(decode=False)}
COLUMNS |= {name: List(Value("int32")) for name in ("input_tokens", "output_tokens")}
PICTURES = ("square", "landscape", "portrait")


def dataset(golden, count):
    """Three different pictures, again and again."""
    rows = records(golden, count)
    for i, row in enumerate(rows):
        row["source"] = {"bytes": (golden / f"images/{PICTURES[i % 3]}.png").read_bytes(), "path": None}
    return Dataset.from_list(rows, features=Features(COLUMNS))


@pytest.fixture
def cached(golden, tmp_path):
    pair, rows = fresh(golden), dataset(golden, 5)
    return pair, rows, features.cache_features([rows], *pair, tmp_path / "prepared")


def test_losses_and_weights_are_those_without_the_cache(golden, cached, tmp_path):
    _, rows, cache = cached
    runs, weights = [], []
    for kept in (None, cache):
        pair = fresh(golden)
        options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_train_epochs": 2}
        trainer = make_trainer(pair, rows, tmp_path / "out", eval_rows=rows, **options)
        trainer.data_collator.features = trainer.eval_collator.features = kept
        if kept is not None:  # nothing but the cache is read
            pair[0].base.model.vision_model.forward = None
        trainer.train()
        runs.append([*history(trainer, "loss", "grad_norm"), [trainer.evaluate()["eval_loss"]] * 2])
        weights.append(trained(trainer.model))
    # One by one or in batches, matrix products round differently in the last place.
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)


def test_batches_hold_what_the_tower_gives(cached):
    (model, processor), rows, cache = cached
    collate = Collator(processor, model.vocabulary)
    plain = collate(rows.to_list())
    collate.features = pickle.loads(pickle.dumps(cache))
    batch = collate(rows.to_list())
    assert "pixel_values" not in batch
    with torch.no_grad():
        expected = model.token_model.see(plain["pixel_values"])
        torch.testing.assert_close(batch["features"], expected, atol=1e-5, rtol=1e-5)
        same = plain | {"features": expected}  # one by one: bit for bit
        assert torch.equal(model(**same).nll, model(**plain).nll)


def test_each_picture_is_computed_once(golden, cached, tmp_path, monkeypatch):
    pair, rows, cache = cached
    files = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    assert len(files) == 3, "five records of three pictures, and nothing half written"
    lost = next(iter(files))
    lost.unlink()
    seen = []

    def count(family, pixels):
        seen.append(len(pixels))
        return see(family, pixels)

    family = type(pair[0].token_model)
    see = family.see
    monkeypatch.setattr(family, "see", count)
    shuffled = rows.select([4, 0, 3, 1, 2])  # another split or order, the same pictures
    features.cache_features([shuffled.select([0]), shuffled], *pair, tmp_path / "prepared")
    assert seen == [1]
    assert {path for path in files if path.stat().st_mtime_ns == files[path]} == set(files) - {lost}


def test_another_tower_has_another_folder(golden, cached, tmp_path):
    (model, processor), rows, cache = cached
    folders = {cache.folder}
    for change in (lambda tower: tower.post_layernorm.bias.data.add_(1e-3), lambda tower: tower.bfloat16()):
        change(model.base.model.vision_model)
        other = features.cache_features([rows.select([0])], model, processor, tmp_path / "prepared")
        folders.add(other.folder)
    assert len(folders) == 3
    assert other.read([("record 0", rows[0]["source"])]).dtype == torch.bfloat16
    moved = copy.copy(processor)
    moved.image_mean = [0.4] * 3
    assert features.cache_features([rows.select([0])], model, moved, tmp_path / "prepared").folder not in folders


def test_what_cannot_be_cached_is_refused(cached, tmp_path):
    (model, processor), rows, _ = cached
    with pytest.raises(ValueError, match="no pictures; leave cache_features out"):
        features.cache_features([rows.remove_columns("source")], model, processor, tmp_path)
    rows = rows.select([0])
    for nothing in (None, {"bytes": None, "path": None}):
        bare = rows.remove_columns("source").add_column("source", [nothing], feature=COLUMNS["source"])
        with pytest.raises(BadRecord, match="record 0: no source picture; leave cache_features out"):
            features.cache_features([bare], model, processor, tmp_path)
    next(model.base.model.vision_model.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="vision tower is trained"):
        features.cache_features([rows], model, processor, tmp_path)


def test_a_lost_or_broken_file_is_named(cached):
    _, rows, cache = cached
    picture = rows[0]["source"]
    path = cache.path(picture, "record 0")
    for damage in (lambda: path.write_bytes(path.read_bytes()[:50]), path.unlink):
        damage()
        with pytest.raises(BadRecord, match=f"record 0: .*{path.name}.*start again"):
            cache.read([("record 0", picture)])


def test_a_recipe_can_ask_for_it(golden, tmp_path):
    runs = []
    options = {"base_model": golden / "checkpoint", "limit": 4, "eval_samples": 2, "max_steps": 2, "logging_steps": 1}
    options |= {"calibration_edits": 0, "sample_edits": 0, "prepared_dir": tmp_path / "prepared"}
    for cached in (False, True):
        options |= {"cache_features": cached, "output_dir": tmp_path / str(cached)}
        cli.main(["train", *(str(part) for key, value in options.items() for part in (f"--{key}", value))])
        results = json.loads((tmp_path / str(cached) / "all_results.json").read_text())
        runs.append([results["train_loss"], results["eval_loss"]])
    assert len(list((tmp_path / "prepared").glob("features-*/*.safetensors"))) == 6
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
