"""Turn after turn on one picture: what no turn touched is the first picture's, and nothing done is ever lost."""

import io
import json
import shutil

import icc
import numpy as np
import pytest
from PIL import Image, ImageOps

from thinkclearly.data.shapes import Background, Scene, Shape, packaged_photos
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.session import SESSION_FILE, EditSession
from thinkclearly.hub.pipeline import DEFAULT_MODEL
from thinkclearly.images import load_photo
from thinkclearly.models.finetunes import load_clear_model

WORDS = ["Make the blue star red.", "add a white circle at the top left", "remove the black square"]
SAMPLED = {"temperature": 1.0}  # so that the seed tells


def draw(width, height):
    """A blue star in the middle and a black square at the bottom right."""
    shapes = (
        Shape("star", "blue", "center", 0.5, 0.5, 0.15),
        Shape("square", "black", "bottom right", 0.83, 0.83, 0.14),
    )
    return Scene(Background(photo=packaged_photos("test")[0]), shapes).render(width, height)


@pytest.fixture(scope="module")
def editor():
    return Editor(*load_clear_model(str(DEFAULT_MODEL), device="cpu"))


@pytest.fixture(scope="module")
def photo():
    return draw(101, 67)


@pytest.fixture(scope="module")
def tree(editor, photo):
    """Turns 1 and 2 in a line, turn 3 a branch from turn 1. Tests that change it take a copy."""
    session = EditSession(editor, photo)
    session.edit(WORDS[0], seed=1, **SAMPLED)
    session.edit(WORDS[1], seed=2, **SAMPLED)
    session.undo()
    session.edit(WORDS[2], seed=3, **SAMPLED)
    return session


@pytest.fixture
def saved(tree, tmp_path):
    tree.save(tmp_path / "saved")
    return tmp_path / "saved"


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("size", [(101, 67), (53, 75), (64, 64), (400, 300)], ids=str)
def test_what_no_turn_touched_is_the_first_pictures(editor, size):
    picture = draw(*size)
    session = EditSession(editor, picture)
    seen = np.zeros(size[::-1], bool)
    for words in WORDS:
        before = session.image
        result = session.edit(words)
        assert same(result.source, before), "the last composite came through the loader unchanged"
        assert session.image is result.image and session.image.size == size
        mask = np.asarray(result.mask) > 127
        assert np.array_equal(session.history[-1].touched, ~mask)
        seen |= ~mask
        assert np.array_equal(session.touched, seen)
        kept = ~session.touched
        assert kept.any() and same(np.asarray(session.image)[kept], np.asarray(picture)[kept])
    assert seen.any() and not same(session.image, picture), "something was edited at all"


def test_smoothing_counts_as_touched_what_it_took_away(editor, photo):
    session = EditSession(editor, photo)
    result = session.edit(WORDS[0], clear_bias=-1.0, mask_smooth_ksize=3)
    assert np.array_equal(session.touched, np.asarray(result.mask) < 128)
    assert not np.array_equal(session.touched, np.asarray(result.gate_mask) < 128)
    assert same(np.asarray(session.image)[~session.touched], np.asarray(photo)[~session.touched])


def test_a_photo_s_colours_and_transparency_go_through_turns_and_files(editor, photo, tmp_path):
    glass, buffer = photo.convert("RGBA"), io.BytesIO()
    glass.putalpha(Image.fromarray(np.tile(np.arange(101, 202, dtype=np.uint8), (67, 1))))
    glass.save(buffer, "PNG", icc_profile=icc.display_p3(), dpi=(300, 300))
    session = EditSession(editor, buffer.getvalue())
    for words in WORDS[:2]:
        session.edit(words)
    session.save(tmp_path)
    session = EditSession.load(editor, tmp_path)
    assert same(session.first, glass) and session.touched.any()
    assert same(np.asarray(session.image)[~session.touched], np.asarray(glass)[~session.touched])
    for picture in (session.first, session.image):
        assert picture.info["icc_profile"] == icc.display_p3() and np.allclose(picture.info["dpi"], 300, atol=0.1)
        assert same(picture.getchannel("A"), glass.getchannel("A"))


def test_a_file_that_wants_turning_or_laying_over_white_gets_it_once(editor, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    photo.save(turned, format="PNG", exif=exif, icc_profile=b"no profile")
    glass = photo.convert("RGBA")
    glass.putalpha(100)
    keyed = io.BytesIO()
    photo.save(keyed, format="PNG", transparency=photo.getpixel((0, 0)))
    for picture in (turned.getvalue(), glass, keyed.getvalue()):
        session = EditSession(editor, picture)
        assert same(session.first, load_photo(picture)) and not {"exif", "transparency"} & set(session.first.info)
        assert same(session.first, load_photo(session.first))
    assert same(EditSession(editor, turned.getvalue()).first, ImageOps.exif_transpose(Image.open(turned)))


def test_the_same_turns_give_the_same_bytes(editor, photo, tree):
    again = EditSession(editor, photo)
    for turn in tree.turns:
        again.checkout(turn.parent)
        again.edit(turn.instruction, seed=turn.seed, **turn.settings)
    assert [turn.image.tobytes() for turn in again.turns] == [turn.image.tobytes() for turn in tree.turns]
    assert len({turn.image.tobytes() for turn in tree.turns}) == 3
    other = EditSession(editor, photo)
    other.edit(WORDS[0], seed=4, **SAMPLED)
    assert not same(other.image, tree.turns[0].image), "the seed matters"


def test_undo_and_checkout_move_and_lose_nothing(tree, saved):
    session = EditSession.load(tree.editor, saved)
    assert [turn.parent for turn in session.turns] == [0, 1, 1]
    assert [turn.instruction for turn in session.turns] == WORDS
    assert [turn.number for turn in session.history] == [1, 3]
    session.checkout(2)
    assert [turn.number for turn in session.history] == [1, 2] and session.image is session.turns[1].image
    session.undo(2)
    assert session.current == 0 and session.history == [] and session.image is session.first
    assert not session.touched.any()
    session.checkout(3)
    session.undo()
    assert session.current == 1
    for n in (0, 2, -1):
        with pytest.raises(ValueError, match=rf"undo\({n}\).*at most 1"):
            session.undo(n)
    for number in (-1, 4):
        with pytest.raises(ValueError, match=rf"checkout\({number}\).*to 3"):
            session.checkout(number)
    assert session.current == 1 and len(session.turns) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"instruction": " "}, ValueError, "empty instruction"),
        ({"feather": "two_sided"}, ValueError, "two_sided.*inside"),
        ({"num_images": 2}, TypeError, "num_images"),
        ({"cfg": 1.0}, TypeError, "cfg_weight"),
    ],
    ids=str,
)
def test_a_refused_edit_leaves_the_session_as_it_was(editor, photo, options, error, message):
    session, calls = EditSession(editor, photo), []
    with pytest.raises(error, match=message):
        session.edit(**{"instruction": WORDS[0], "progress": lambda *done: calls.append(done)} | options)
    assert session.turns == [] and session.image is session.first and not calls


def test_a_saved_session_comes_back_and_goes_on(tree, saved, editor):
    session = EditSession.load(editor, saved)
    assert session.current == tree.current == 3 and same(session.first, tree.first)
    for found, turn in zip(session.turns, tree.turns, strict=True):
        assert same(found.image, turn.image) and np.array_equal(found.clear, turn.clear)
        for name in ("number", "parent", "instruction", "seed", "settings", "letterbox"):
            assert getattr(found, name) == getattr(turn, name)
    assert np.array_equal(session.touched, tree.touched)
    session.checkout(1)
    session.edit(WORDS[1], seed=2, **SAMPLED)
    assert same(session.image, tree.turns[1].image), "turn 2 again, from pictures that went through files"
    times = {path.name: path.stat().st_mtime_ns for path in saved.glob("*.png")}
    session.save(saved)
    after = {path.name: path.stat().st_mtime_ns for path in saved.glob("*.png")}
    assert times.items() <= after.items() and len(after) == len(times) + 1, "one new turn, one new picture"
    assert len(EditSession.load(editor, saved).turns) == 4


def test_another_session_is_not_written_over(editor, photo, tree, saved):
    before = (saved / SESSION_FILE).read_bytes()
    longer, shorter = EditSession.load(editor, saved), EditSession(editor, photo)
    longer.turns = longer.turns[:2] + [longer.turns[1]]
    for session in (longer, shorter, EditSession(editor, photo.rotate(180))):
        with pytest.raises(ValueError, match="another session"):
            session.save(saved)
    assert (saved / SESSION_FILE).read_bytes() == before


def test_an_interrupted_save_leaves_what_was_saved(tree, saved, editor, monkeypatch):
    session = EditSession.load(editor, saved)
    session.edit(WORDS[0], **SAMPLED)
    # The picture's file is complete before session.json names it; here the disk is full in between.
    monkeypatch.setattr("thinkclearly.editing.session.json.dumps", lambda *_, **__: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError):
        session.save(saved)
    monkeypatch.undo()
    assert len(EditSession.load(editor, saved).turns) == 3
    session.save(saved)
    assert len(EditSession.load(editor, saved).turns) == 4
    assert not list(saved.glob(".*"))


def test_loading_says_which_file_is_wrong(saved, editor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*session\.json"):
        EditSession.load(editor, tmp_path / "nowhere")
    second = next(saved.glob("0002-*.png"))
    for spoil, message in [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot be read"),
        (lambda path: ImageOps.invert(Image.open(path)).save(path), "not the picture that was saved"),
    ]:
        folder = tmp_path / message
        shutil.copytree(saved, folder)
        spoil(folder / second.name)
        with pytest.raises(ValueError, match=rf"{second.name}.*{message}"):
            EditSession.load(editor, folder)


def wrong(**changes):
    """A record with some of its keys changed; `turn` changes keys of the second turn."""
    return lambda record: record | changes


def wrong_turn(**changes):
    return lambda record: record | {"turns": [record["turns"][0], record["turns"][1] | changes, record["turns"][2]]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: [], "not a saved session"),
        (lambda record: {}, "not a saved session"),
        (wrong(format=2), "format 2, expected 1; upgrade"),
        (wrong(turns=None), "'turns' is None"),
        (wrong(turns=["x"]), "turn 1 is 'x'"),
        (wrong(current=4), "'current' is 4 of 3"),
        (wrong(current=True), "'current' is True"),
        (wrong(first="../photo.png"), "picture 0 is called '../photo.png'"),
        (wrong_turn(picture="/0002-0123456789abcdef.png"), "picture 2 is called"),
        (wrong_turn(parent=2), "turn 2 follows turn 2"),
        (wrong_turn(seed="1"), "turn 2: 'seed' is '1'"),
        (wrong_turn(settings=[]), r"turn 2: 'settings' is \[\]"),
        (wrong_turn(clear=["01"]), "turn 2: 'clear' is no square"),
        (wrong_turn(clear=[]), "turn 2: 'clear' is no square"),
        (wrong_turn(clear=["2"]), "turn 2: 'clear' is no square"),
        (wrong_turn(square=4), "turn 2: 'square' is 4"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(saved, editor, spoil, message):
    path = saved / SESSION_FILE
    path.write_text(json.dumps(spoil(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"session\.json: .*{message}"):
        EditSession.load(editor, saved)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_what_is_not_json_is_refused(saved, editor, content):
    (saved / SESSION_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"session\.json: not JSON"):
        EditSession.load(editor, saved)


def test_pictures_of_two_sizes_are_refused(editor, photo, saved, tmp_path):
    small = EditSession(editor, photo.resize((50, 40)))
    small.save(tmp_path / "small")
    (picture,) = (tmp_path / "small").glob("*.png")
    shutil.copy(picture, saved)
    path = saved / SESSION_FILE
    path.write_text(json.dumps(wrong_turn(picture=picture.name)(json.loads(path.read_text(encoding="utf-8")))))
    with pytest.raises(ValueError, match=rf"{picture.name}.*\(50, 40\).*\(101, 67\)"):
        EditSession.load(editor, saved)
