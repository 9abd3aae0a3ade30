from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from thinkclearly.data import photographs, shapes
from thinkclearly.data.shapes import (
    OPERATIONS,
    PALETTE,
    PLACES,
    SHAPES,
    WORDINGS,
    Scene,
    ShapeEdit,
    edit_scene,
    packaged_photos,
    picture_size,
    random_edit,
    random_scene,
)

SIDE, COUNT = 64, 600
STREAM = [
    "Change the blue circle to yellow.",
    "bring the blue triangle to the top right",
    "Move the blue star to the top right.",
    "Paint the background blue.",
    "change the white circle to purple",
    "Replace the purple square with a circle.",
]


@pytest.fixture(scope="module")
def edits():
    """Edits by operation: (edit, source, target, mask)."""
    drawn = defaultdict(list)
    for split, first in (("train", 0), ("test", 10**9)):
        photos = packaged_photos(split)
        for index in range(first, first + COUNT // 2):
            edit = random_edit(1, index, photos)
            drawn[edit.operation].append((edit, *edit.render(*picture_size(1, index, SIDE))))
    return drawn


def difference(edit):
    """Shapes that are only in the source, and only in the target."""
    before, after = set(edit.before.shapes), set(edit.after.shapes)
    return before - after, after - before


def done(edits, picture_of, minimum=0.0, maximum=1.0):
    """Checks the judge's yes-rate of each operation."""
    for operation, examples in edits.items():
        rate = np.mean([edit.is_done(picture_of(*pictures)) for edit, *pictures in examples])
        assert minimum <= rate <= maximum, f"{operation}: {rate:.3f} of {len(examples)}"


# Edits


def test_the_same_seed_gives_the_same_edit():
    photos = packaged_photos("train")
    for index in (0, 1, 10**9):
        edit = random_edit(7, index, photos)
        assert random_edit(7, index, photos) == edit
        assert all(a.tobytes() == b.tobytes() for a, b in zip(edit.render(SIDE), edit.render(SIDE)))
    assert len({random_edit(7, index, photos) for index in range(20)}) == 20
    assert random_edit(7, 0, photos) != random_edit(8, 0, photos)


def test_the_stream_of_edits_stays():
    """Trained models and published numbers refer to examples by number."""
    photos = packaged_photos("train")
    assert [random_edit(0, index, photos).instruction for index in range(6)] == STREAM


def test_the_mask_is_where_the_pictures_differ(edits):
    for examples in edits.values():
        for _, source, target, mask in examples:
            differs = (np.asarray(source) != np.asarray(target)).any(-1)
            assert np.array_equal(np.asarray(mask), np.where(differs, 255, 0)) and differs.any()


def test_only_the_named_thing_changes(edits):
    for operation, examples in edits.items():
        for edit, *_ in examples:
            gone, new = difference(edit)
            text = edit.instruction.lower().rstrip(".")
            if operation == "background":
                assert not gone and not new and edit.after.background.name in text.split()
                continue
            assert edit.before.background == edit.after.background
            assert (len(gone), len(new)) == {"add": (0, 1), "remove": (1, 0)}.get(operation, (1, 1))
            for shape in gone:
                assert f"the {shape.colour} {shape.name}" in text
            for shape in new:
                named = {
                    "recolour": (shape.colour,), "replace": (f"a {shape.name}",), "move": (f"to the {shape.place}",),
                    "add": (f"{shape.colour} {shape.name}", f"at the {shape.place}"),
                }[operation]  # fmt: skip
                assert all(words in text for words in named), edit.instruction


def test_what_is_named_is_unambiguous(edits):
    for examples in edits.values():
        for edit, *_ in examples:
            for scene in (edit.before, edit.after):
                kinds = [(shape.name, shape.colour) for shape in scene.shapes]
                places = [shape.place for shape in scene.shapes]
                assert len(set(kinds)) == len(kinds) and len(set(places)) == len(places)
                assert scene.background.name not in {shape.colour for shape in scene.shapes}


def test_every_word_is_reachable(edits):
    flat = [edit for examples in edits.values() for edit, *_ in examples]
    assert set(edits) == set(OPERATIONS)
    texts = [edit.instruction for edit in flat]
    for operation, wordings in WORDINGS.items():
        for wording in wordings:
            start = wording.split("{")[0]
            assert any(e.operation == operation and e.instruction.lower().startswith(start) for e in flat), wording
    for word in (*PALETTE, *SHAPES, *PLACES):
        assert any(word in text.lower().rstrip(".").split(" ") or f" {word}" in text for text in texts), word
    assert {text[-1] == "." for text in texts} == {True, False}
    assert not any("{" in text or "  " in text or "a orange" in text for text in texts)
    backgrounds = [edit.before.background for edit in flat]
    assert {bool(b.photo) for b in backgrounds} == {True, False} and {bool(b.name) for b in backgrounds} == {
        True,
        False,
    }
    assert {len(edit.before.shapes) for edit in flat} == {1, 2, 3}


def test_chosen_operations():
    photos = packaged_photos("train")
    assert {random_edit(0, i, photos, ("move",)).operation for i in range(5)} == {"move"}
    with pytest.raises(ValueError, match="Unknown edit operation 'spin'; choose from recolour, remove"):
        edit_scene(random_scene(np.random.default_rng(0), photos), "spin", np.random.default_rng(0))


def test_photographs():
    parts = [packaged_photos(split) for split in ("train", "calibration", "test")]
    assert [len(part) for part in parts] == [7, 3, 2]
    assert len({Image.open(path).tobytes() for part in parts for path in part}) == 12
    train = parts[0]
    drawn = {random_edit(0, i, train).before.background.photo for i in range(200)}
    assert drawn == {*train, ""}
    assert not any(random_edit(0, i, []).before.background.photo for i in range(20))


def test_missing_photographs(monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match="photographs that skimage ships.*photos_folder"):
        packaged_photos("train")


# Sizes


@pytest.mark.parametrize("size", [(32, 32), (64, 41), (37, 64), (384, 384), (1200, 900)])
def test_any_size(size):
    photos = packaged_photos("train")
    for operation in OPERATIONS:
        for index in range(2 if max(size) < 1000 else 1):
            edit = random_edit(3, index, photos, (operation,))
            source, target, mask = edit.render(*size)
            assert source.size == target.size == mask.size == size and source.mode == "RGB" and mask.mode == "L"
            assert edit.is_done(target) and not edit.is_done(source)


def test_picture_size():
    sizes = [picture_size(0, index, SIDE) for index in range(400)]
    assert sizes == [picture_size(0, index, SIDE) for index in range(400)]
    assert {max(size) for size in sizes} == {SIDE} and min(map(min, sizes)) >= 0.6 * SIDE - 1
    assert 0.6 < np.mean([w == h for w, h in sizes]) < 0.8
    assert {np.sign(w - h) for w, h in sizes} == {-1, 0, 1}


# The judge


def test_targets_are_done(edits):
    done(edits, lambda source, target, mask: target, minimum=0.97)


def test_sources_are_not(edits):
    done(edits, lambda source, target, mask: source, maximum=0.03)


def test_the_judge_bears_blur_and_noise(edits):
    rng = np.random.default_rng(0)

    def noisy(picture):
        pixels = np.asarray(picture) + rng.normal(0, 10, (picture.height, picture.width, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    few = {operation: examples[:25] for operation, examples in edits.items()}
    done(few, lambda source, target, mask: target.filter(ImageFilter.GaussianBlur(0.7)), minimum=0.9)
    done(few, lambda source, target, mask: source.filter(ImageFilter.GaussianBlur(0.7)), maximum=0.03)
    done(few, lambda source, target, mask: noisy(target), minimum=0.9)
    done(few, lambda source, target, mask: noisy(source), maximum=0.03)


def wrong(edit, change):
    """The target with its new shape changed."""
    (new,) = difference(edit)[1]
    return replace(edit.after, shapes=tuple(replace(s, **change(s)) if s == new else s for s in edit.after.shapes))


@pytest.mark.parametrize(
    ("operations", "change"),
    [
        (("recolour", "add", "move"), lambda s: {"colour": "blue" if s.colour != "blue" else "orange"}),
        (("add", "move"), lambda s: {"x": s.x - 0.33 if s.x > 0.4 else s.x + 0.33}),
        (("add",), lambda s: {"name": "star" if s.name != "star" else "square"}),
    ],
    ids=["colour", "place", "shape"],
)
def test_something_else_is_not_done(edits, operations, change):
    few = {operation: edits[operation][:40] for operation in operations}
    rates = [e.is_done(wrong(e, change).render(*s.size)) for examples in few.values() for e, s, *_ in examples]
    assert np.mean(rates) <= 0.06


def test_half_a_move_is_not_done(edits):
    """The shape is at its new place and still at the old one."""
    for edit, source, *_ in edits["move"][:20]:
        (new,) = difference(edit)[1]
        both = replace(edit.before, shapes=(*edit.before.shapes, new))
        assert not edit.is_done(both.render(*source.size))


def test_other_changes_do_not_matter(edits):
    """The judge looks at the edit alone; preservation is measured elsewhere."""
    edit, source, target, mask = next(e for e in edits["remove"] if np.asarray(e[3]).mean() < 64)
    pixels = np.array(target)
    untouched = np.asarray(mask) == 0
    pixels[untouched] = 255 - pixels[untouched]
    assert edit.is_done(Image.fromarray(pixels))


def test_captions():
    scene = random_edit(0, 0, []).after
    named = replace(scene, background=shapes.Background((PALETTE["orange"],), name="orange"))
    assert named.caption().endswith(" on an orange background")
    assert all(f"{shape.colour} {shape.name} at the {shape.place}" in named.caption() for shape in scene.shapes)
    assert replace(named, shapes=()).caption() == "nothing on an orange background"


# As JSON


def test_a_scene_comes_back_from_json_with_the_same_pictures(edits):
    for examples in edits.values():
        for edit, source, *_ in examples[:30]:
            again = Scene.from_json(edit.before.to_json())
            assert again == edit.before and again.render(*source.size).tobytes() == source.tobytes()


def test_a_packaged_photograph_is_found_in_another_installation():
    (photo,) = [path for path in packaged_photos("train") if path.endswith("china.jpg")]
    scene = Scene(shapes.Background(photo=photo), ())
    assert str(Path(photo).parent) not in scene.to_json()
    assert Scene.from_json(scene.to_json()).background.photo == photo


def test_a_photograph_of_ones_own_stays_where_it_is(tmp_path):
    scene = Scene(shapes.Background(photo=str(tmp_path / "china.jpg")), ())
    assert Scene.from_json(scene.to_json()) == scene


def test_a_scene_names_no_module_to_import():
    text = Scene(shapes.Background(), ()).to_json().replace('"photo": ""', '"photo": ["this", "data.png"]')
    with pytest.raises(ValueError, match="none of the photographs that ship"):
        Scene.from_json(text)


def test_an_edit_comes_back_from_json(edits):
    for operation, examples in edits.items():
        for edit, source, target, mask in examples[:3]:
            back = ShapeEdit.from_json(edit.to_json())
            assert back == edit, operation
            assert [p.tobytes() for p in back.render(*source.size)] == [p.tobytes() for p in (source, target, mask)]
