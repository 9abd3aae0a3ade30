"""A second instruction, BLUR, which no module of the package knows: registered here, it goes the whole way.

"This patch is the source, blurred", from the photo pairs over training, editing, sessions and metrics to the Hub.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageFilter
from torch.utils.data import default_collate

from thinkclearly import cli, load_editor, register_instruction
from thinkclearly.data import sources
from thinkclearly.data.collator import Collator
from thinkclearly.data.encode import load_encoded
from thinkclearly.data.jsonl import read_jsonl, write_jsonl
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.data.sources import BadRecord, EditExample, write_folder
from thinkclearly.editing.session import EditSession
from thinkclearly.evaluation.edits import evaluate_edits
from thinkclearly.images import Letterbox
from thinkclearly.instructions import TRANSFORMS, InstructionVocabulary
from thinkclearly.models.instruction_head import read_clear_config
from thinkclearly.models.load import load_checkpoint

K, N, GRID, SIDE = 128, 36, 6, 96
NAMES = ("CLEAR", "BLUR")
CLEAR, BLUR = K, K + 1
ROWS = {"clear": slice(0, 2), "blur": slice(2, 4), "painted": slice(4, 6)}  # of patches, in every target


def blur(picture):
    return picture.filter(ImageFilter.GaussianBlur(4))


def noise(seed, width=SIDE, height=SIDE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def example(seed):
    """Of six rows of patches two stay, two are blurred and two are painted black."""
    source = noise(seed)
    target = np.asarray(source).copy()
    target[32:64] = np.asarray(blur(source))[32:64]
    target[64:] = 0
    return EditExample(source, Image.fromarray(target), f"Blur the middle, take {seed}.")


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_instruction("BLUR", blur)
    yield
    del TRANSFORMS["BLUR"]


@pytest.fixture
def unregistered(monkeypatch):
    monkeypatch.delitem(TRANSFORMS, "BLUR")


@pytest.fixture(scope="module")
def checkpoint(golden):
    return load_checkpoint(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("blur")


@pytest.fixture(scope="module")
def pairs(home):
    write_folder(map(example, range(10)), home / "pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", home / "cache")
        yield sources.folder(home / "pairs")


@pytest.fixture(scope="module")
def prepared(pairs, checkpoint, home):
    return prepare_dataset(pairs, checkpoint, home / "prepared", instructions=NAMES)


@pytest.fixture(scope="module")
def recipe(golden, pairs, home):
    content = {
        **{"base_model": str(golden / "checkpoint"), "instructions": list(NAMES), "source": "folder"},
        **{"path": str(home / "pairs"), "prepared_dir": str(home / "prepared"), "lora_r": 4, "sample_edits": 1},
        **{"eval_samples": 2, "calibration_edits": 2, "max_steps": 3, "eval_steps": 3, "save_steps": 3},
        **{"per_device_train_batch_size": 2, "logging_steps": 1, "drop_source": 0.0, "drop_all": 0.0},
        **{"output_dir": str(home / "run"), "use_cpu": True, "learning_rate": 1e-3},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(content))
    return home / "recipe.yaml"


@pytest.fixture(scope="module")
def run(recipe, home):
    """What `thinkclearly train` leaves."""
    cli.main(["train", str(recipe)])
    return home / "run"


@pytest.fixture(scope="module")
def editor(run):
    """The fine-tune, with a head that is loud by hand: some patches are CLEAR, some BLUR, some painted."""
    editor = load_editor(str(run))
    torch.nn.init.normal_(editor.model.clear_head.weight, std=2.0, generator=torch.Generator().manual_seed(5))
    editor.model.clear_head.bias.data.fill_(2.0)
    editor.model.clear_config.gate_bias, editor.model.clear_config.gate_temperature = 0.0, 1.0
    return editor


@pytest.fixture(scope="module")
def photo():
    return noise(100, 150, 110)  # not square, and not of the model's size


@pytest.fixture(scope="module")
def result(editor, photo):
    result = editor.edit(photo, "Blur the middle.", temperature=0.0)
    assert {CLEAR, BLUR} < set(result.class_ids.tolist()), "the test needs all three kinds"
    return result


def labels_of(rows):
    return np.asarray(rows["output_tokens"][:]).reshape(len(rows), GRID, GRID)


def patches(result, kind):
    return (result.class_ids == kind).view(GRID, GRID).numpy()


def test_patches_are_labelled_by_the_instruction_that_makes_them(prepared, checkpoint):
    labels = labels_of(prepared)
    assert (labels[:, ROWS["clear"]] == CLEAR).all()
    assert (labels[:, ROWS["blur"]] == BLUR).all()
    assert (labels[:, ROWS["painted"]] < K).all()
    blurred = [blur(example(i).source) for i in range(len(prepared))]
    codes = checkpoint.token_model.encode(checkpoint.processor.pixel_values(blurred))
    transformed = torch.tensor(prepared["transformed_tokens"][:]).view(-1, len(NAMES), N)
    assert torch.equal(transformed[:, 0], torch.tensor(prepared["input_tokens"][:]))
    assert torch.equal(transformed[:, 1], codes)


def test_equal_codes_label_too(pairs, checkpoint, home):
    rows = prepare_dataset(pairs, checkpoint, home / "prepared", instructions=NAMES, clear_label="tokens")
    transformed = np.asarray(rows["transformed_tokens"][:]).reshape(-1, len(NAMES), N)
    source, blurred = transformed.swapaxes(0, 1)
    target = np.asarray(rows["target_tokens"][:])
    expected = np.where(target == source, CLEAR, np.where(target == blurred, BLUR, target))
    assert np.array_equal(np.asarray(rows["output_tokens"][:]), expected) and (expected == BLUR).any()


def test_another_transform_of_the_same_name_is_encoded_anew(prepared, pairs, checkpoint, home, monkeypatch):
    monkeypatch.setitem(TRANSFORMS, "BLUR", lambda picture: picture.filter(ImageFilter.GaussianBlur(1)))
    other = prepare_dataset(pairs, checkpoint, home / "prepared", instructions=NAMES)
    assert other["transformed_tokens"][:] != prepared["transformed_tokens"][:]
    folders = [path.parent for path in (home / "prepared").glob("*/preparation.json")]
    transforms = InstructionVocabulary(K, NAMES).transforms_seen()
    refused = 0
    for folder in folders:
        try:
            load_encoded(folder, checkpoint, transforms)
        except ValueError as error:
            assert "was prepared for CLEAR" in str(error) and "with the transforms registered now" in str(error)
            refused += 1
    assert refused == len(folders) - 1


def test_prepared_data_of_other_instructions_are_refused(prepared, checkpoint, home):
    (folder,) = [
        path.parent
        for path in (home / "prepared").glob("*/preparation.json")
        if json.loads(path.read_text())["transforms"] == InstructionVocabulary(K, NAMES).transforms_seen()
    ]
    for names in (("CLEAR",), ("BLUR", "CLEAR")):
        with pytest.raises(ValueError, match="was prepared for CLEAR .*, BLUR .* is asked for"):
            load_encoded(folder, checkpoint, InstructionVocabulary(K, names).transforms_seen())


def test_a_transform_that_changes_size_or_mode_is_named(monkeypatch):
    for change in (lambda p: p.resize((8, 8)), lambda p: p.convert("L")):
        monkeypatch.setitem(TRANSFORMS, "BLUR", change)
        with pytest.raises(ValueError, match="instruction BLUR: .*must keep both"):
            InstructionVocabulary(K, NAMES).transforms(noise(0))


def test_a_training_batch_feeds_back_the_blurred_codes(prepared, checkpoint, editor):
    batch = Collator(checkpoint.processor, InstructionVocabulary(K, NAMES))(prepared.to_list()[:3])
    assert batch["transformed"].shape == (3, len(NAMES), N)
    expected = torch.tensor(prepared["transformed_tokens"][:3]).view(3, len(NAMES), N)
    fed = editor.model.vocabulary.remap(batch["labels"], batch["transformed"]).view(3, GRID, GRID)
    assert torch.equal(fed[:, ROWS["blur"]], expected[:, 1].view(3, GRID, GRID)[:, ROWS["blur"]])
    assert torch.equal(fed[:, ROWS["clear"]], expected[:, 0].view(3, GRID, GRID)[:, ROWS["clear"]])


def test_training_logs_each_instruction_by_its_name(run):
    results = json.loads((run / "all_results.json").read_text())
    for name in ("clear", "blur"):
        assert results[f"eval_{name}_rate_true"] == pytest.approx(1 / 3)
        assert 0 <= results[f"eval_{name}_rate_predicted"] <= 1
    assert 0 <= results["eval_gate_auc"] <= 1


def test_a_fine_tune_names_its_instructions_and_loads_with_them(run, editor):
    assert read_clear_config(run).instructions == [*NAMES]
    assert editor.model.vocabulary.names == NAMES and editor.model.clear_head.out_features == 2


def test_without_the_instruction_registered_nothing_is_loaded(run, unregistered):
    with pytest.raises(ValueError, match=r"Unknown instruction tokens \['BLUR'\].*register_instruction before"):
        load_editor(str(run))


def test_an_edit_feeds_back_what_each_instruction_stands_for(editor, result, photo):
    box = Letterbox(*photo.size, SIDE)
    squares = [box.fit(photo), box.fit(blur(photo))]
    source, blurred = editor.model.token_model.encode(editor.processor.pixel_values(squares))
    ids = result.class_ids
    assert torch.equal(result.source_tokens, source)
    expected = torch.where(ids == CLEAR, source, torch.where(ids == BLUR, blurred, ids))
    assert torch.equal(result.fed_codes, expected) and (source != blurred)[ids == BLUR].any()


@pytest.mark.parametrize("settings", [{"block": 1}, {"block": 0}, {"jacobi": False}])
def test_blocks_decode_the_same(editor, result, photo, settings):
    other = editor.edit(photo, "Blur the middle.", temperature=0.0, **settings)
    assert torch.equal(other.class_ids, result.class_ids) and torch.equal(other.fed_codes, result.fed_codes)


def test_each_patch_is_the_picture_that_its_instruction_makes(result, photo):
    image, box = np.asarray(result.image), result.letterbox
    assert result.image.size == photo.size
    clear, blurred = (box.unfit_grid(patches(result, kind)) for kind in (CLEAR, BLUR))
    assert np.array_equal(image[clear], np.asarray(photo)[clear])
    assert np.array_equal(image[blurred], np.asarray(blur(photo))[blurred])
    assert (image[blurred] != np.asarray(photo)[blurred]).any()
    # What is called CLEAR is the source itself, and nothing else.
    assert np.array_equal(np.asarray(result.mask) == 255, clear)
    assert result.clear_fraction == pytest.approx(clear.mean())
    assert np.array_equal(result.clear, patches(result, CLEAR))
    assert np.array_equal(result.chosen, patches(result, CLEAR) | patches(result, BLUR))


def test_a_session_has_touched_what_is_blurred(editor, photo, tmp_path):
    session = EditSession(editor, photo)
    first = session.edit("Blur the middle.", temperature=0.0)
    assert np.array_equal(session.touched, ~first.letterbox.unfit_grid(patches(first, CLEAR)))
    assert session.touched[first.letterbox.unfit_grid(patches(first, BLUR))].all()
    session.edit("Blur it again.", temperature=0.0)
    kept = ~session.touched
    assert np.array_equal(np.asarray(session.image)[kept], np.asarray(photo)[kept])
    session.save(tmp_path)
    again = EditSession.load(editor, tmp_path)
    assert np.array_equal(again.touched, session.touched)
    session.undo()
    assert session.image.tobytes() == first.image.tobytes()
    session.undo()
    assert session.image.tobytes() == photo.tobytes() and not session.touched.any()


def test_metrics_tell_clear_and_blur_apart(editor):
    examples = [example(i) for i in range(4)]
    evaluation = evaluate_edits(editor, examples)
    ids = torch.stack([result.class_ids for result in evaluation.results])
    for heading, kind in (("labels", CLEAR), ("BLUR", BLUR)):
        found = evaluation.clear[heading]
        assert found["clear_true"] == 4 * N // 3 and found["positions"] == 4 * N
        assert found["clear_predicted"] == int((ids == kind).sum())
        rows = ROWS["clear" if kind == CLEAR else "blur"]
        assert found["clear_both"] == int((ids.view(4, GRID, GRID)[:, rows] == kind).sum())
    # The gate says copy or paint, so both count as copied there.
    truth = evaluation.instructed.reshape(4, GRID, GRID)
    assert truth[:, :4].all() and not truth[:, 4:].any()


def test_the_prepare_command_writes_words_and_counts_each(recipe, checkpoint, home, tmp_path):
    look = ["--output_dir", str(tmp_path / "look"), "--jsonl", str(tmp_path / "train.jsonl")]
    cli.main(["prepare", str(recipe), *look])
    statistics = json.loads((tmp_path / "look" / "statistics.json").read_text())
    assert statistics["clear_ratio"]["labels"]["mean"] == pytest.approx(1 / 3)
    assert statistics["instruction_ratio"]["BLUR"]["mean"] == pytest.approx(1 / 3)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(line["output_tokens"].count("<BLUR>") == line["output_tokens"].count("<CLEAR>") == 12 for line in lines)
    # Trained on again they give the same batch, but for the pictures, which the lines do not hold.
    rows, _ = read_jsonl(tmp_path / "train.jsonl", K, N, names=NAMES)
    collate = Collator(checkpoint.processor, InstructionVocabulary(K, NAMES))
    batch = collate([row | {"key": str(i)} for i, row in enumerate(rows)])
    labels = default_collate([torch.tensor(row["output_tokens"]) for row in rows])
    assert torch.equal(batch["labels"], labels) and (labels == BLUR).any()
    assert torch.equal(batch["transformed"].flatten(1), torch.tensor(rows["transformed_tokens"][:]))
    options = ["--source", "jsonl", "--path", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "run")]
    cli.main(["train", str(recipe), *options, "--max_steps", "1", "--eval_samples", "1"])
    assert read_clear_config(tmp_path / "run").instructions == [*NAMES]


def test_json_lines_round_trip(prepared, tmp_path):
    write_jsonl(prepared, tmp_path / "data.jsonl", K, NAMES)
    back, skipped = read_jsonl(tmp_path / "data.jsonl", K, N, names=NAMES)
    assert skipped == [] and back.to_list() == prepared.select_columns(back.column_names).to_list()


def test_words_without_the_codes_they_stand_for_are_not_trained_on(prepared, checkpoint):
    row = {name: value for name, value in prepared[0].items() if name != "transformed_tokens"}
    with pytest.raises(BadRecord, match="sample_0000.*no transformed_tokens, the codes that CLEAR, BLUR stand for"):
        Collator(checkpoint.processor, InstructionVocabulary(K, NAMES))([row])


PUSH = """
import sys
from PIL import ImageFilter
import thinkclearly
from thinkclearly import cli
thinkclearly.register_instruction("BLUR", lambda picture: picture.filter(ImageFilter.GaussianBlur(4)))
cli.main(["push", sys.argv[1], "--repo_id", "you/blur", "--license", "mit", "--base_model_id", "you/base",
          "--merged", "native", "--dtype", "float32"])
"""

LOAD = """
import json, sys
from PIL import ImageFilter
import thinkclearly
try:
    thinkclearly.load_editor("you/blur")
except ValueError as error:
    print(error)
thinkclearly.register_instruction("BLUR", lambda picture: picture.filter(ImageFilter.GaussianBlur(4)))
editor = thinkclearly.load_editor("you/blur")
print(json.dumps(editor.edit(sys.argv[1], "Blur the middle.", temperature=0.0).class_ids.tolist()))
"""


def client(hub, cache):
    """The environment of a client that knows no Hub but this one and has nothing in its cache."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_you", "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    return outer | own | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def python(script, *arguments, env):
    found = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout.splitlines()


def test_pushed_it_loads_elsewhere_once_it_is_registered(run, photo, hub, tmp_path):
    photo.save(tmp_path / "photo.png")
    python(PUSH, str(run), env=client(hub, tmp_path / "here"))
    files = hub.files("you/blur")
    assert json.loads(files["clear_config.json"])["instructions"] == [*NAMES]
    card = files["README.md"].decode()
    assert "`<BLUR>`" in card and 'thinkclearly.register_instruction("BLUR", transform)' in card
    *refused, ids = python(LOAD, str(tmp_path / "photo.png"), env=client(hub, tmp_path / "there"))
    assert "Unknown instruction tokens ['BLUR']" in refused[-1]
    expected = load_editor(str(run)).edit(photo, "Blur the middle.", temperature=0.0)
    assert json.loads(ids) == expected.class_ids.tolist()
