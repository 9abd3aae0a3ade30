"""What is held out is the same whatever else is prepared, and never what is trained on."""

import pytest

from thinkclearly.config import DataArguments
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.data.sources import EditExample, write_folder
from thinkclearly.models.backbone import load_backbone
from thinkclearly.splits import build_data


@pytest.fixture(scope="module")
def backbone(golden):
    return load_backbone(golden / "checkpoint")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a folder of five pairs and of the built-in shapes."""
    folder, photos = tmp_path_factory.mktemp("pairs"), packaged_photos("train")
    edits = [random_edit(3, number, photos) for number in range(5)]
    write_folder((EditExample(*edit.render(48, 48)[:2], edit.instruction) for edit in edits), folder)
    return {"folder": {"path": str(folder)}, "shapes": {"limit": 3, "shapes_size": 48}}


@pytest.mark.parametrize("source", ["folder", "shapes"])
def test_without_training_only_what_is_held_out_is_prepared(source, options, backbone, tmp_path, own_cache):
    data = DataArguments(source=source, eval_samples=2, prepared_dir=str(tmp_path / "held-out"), **options[source])
    alone = build_data(data, backbone, train=False)
    assert alone.train is None and len(alone.test) == 2
    assert len(list((tmp_path / "held-out").iterdir())) == 1
    data.prepared_dir = str(tmp_path / "both")
    both = build_data(data, backbone)
    assert both.test["key"][:] == alone.test["key"][:] == alone.test_rows["key"][:]
    assert both.test["output_tokens"][:] == alone.test["output_tokens"][:]
    assert len(both.train) == 3 and not set(both.train["key"]) & set(both.test["key"])


def test_nothing_held_out_is_none(options, backbone, tmp_path, own_cache):
    data = DataArguments(source="folder", eval_samples=0, prepared_dir=str(tmp_path), **options["folder"])
    found = build_data(data, backbone)
    assert len(found.train) == 5 and found.test is None and found.test_rows is None
