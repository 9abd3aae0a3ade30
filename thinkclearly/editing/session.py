"""Instruction after instruction on one picture: each turn edits the last composite; undo, branches, save and load.

Keeps the turns, which picture each began with, and what none of them touched. Does not know how an edit is made.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from thinkclearly.editing.editor import Editor
from thinkclearly.editing.result import EditResult
from thinkclearly.files import replacing, write_json
from thinkclearly.images import REFERENCE_MIN_SIDE, Letterbox, load_photo

SESSION_FILE, FORMAT = "session.json", 1
# What a turn is in the file; the picture's name ends in a digest of its pixels.
FIELDS = {
    "parent": int,
    "instruction": str,
    "seed": int,
    "settings": dict,
    "picture": str,
    "square": int,
    "clear": list,
}
PICTURE_NAME = re.compile(r"\d{4,}-([0-9a-f]{16})\.png")


@dataclass(frozen=True, eq=False)
class Turn:
    """One edit of a session.

    Attributes:
        number: 1, 2, … in the order the turns were made, over all branches.
        parent: number of the turn whose picture was edited; 0 is the first picture.
        instruction, seed, settings: what was asked; `settings` holds every field of `EditSettings`.
        image: the composite, the first picture's size.
        clear: bool (g, g), the patches that the composite took from the parent's picture.
        letterbox: how the picture sits in the square that the patches divide.
    """

    number: int
    parent: int
    instruction: str
    seed: int
    settings: dict
    image: Image.Image
    clear: np.ndarray
    letterbox: Letterbox

    @property
    def touched(self) -> np.ndarray:
        """Pixels outside CLEAR patches, bool (H, W): all others are the parent's, byte for byte."""
        return ~self.letterbox.unfit_grid(self.clear)


class EditSession:
    """A picture and what was done to it.

    Turns form a tree: an edit after `undo` or `checkout` begins a branch, and no turn is ever lost. Whatever no turn
    on the way touched is the first picture's, byte for byte, at its own size:
    `np.asarray(session.image)[~session.touched]` equals `np.asarray(session.first)[~session.touched]`. The same turns
    on the same picture, with the same model on the same machine, give the same bytes.

    Args:
        editor: makes the edits.
        image: path, bytes, PIL picture or array, of any size and shape; see `images.load_photo`.

    Attributes:
        first: the picture as it came, RGB or RGBA, with its colour profile, resolution and EXIF.
        turns: all turns of all branches, in the order they were made; turn n is `turns[n - 1]`.
        current: number of the turn that `image` shows and the next edit begins with; 0 is the first picture.
    """

    def __init__(self, editor: Editor, image):
        self.editor = editor
        self.first = load_photo(image)
        self.turns: list[Turn] = []
        self.current = 0

    @property
    def image(self) -> Image.Image:
        """The picture as it is now, in the first picture's size, mode and colours."""
        return self.turns[self.current - 1].image if self.current else self.first

    @property
    def history(self) -> list[Turn]:
        """The turns from the first picture to `image`, without those of other branches."""
        turns, number = [], self.current
        while number:
            turns.append(self.turns[number - 1])
            number = turns[-1].parent
        return turns[::-1]

    @property
    def touched(self) -> np.ndarray:
        """Pixels that any turn of `history` may have changed, bool (H, W)."""
        touched = np.zeros((self.first.height, self.first.width), bool)
        for turn in self.history:
            touched |= turn.touched
        return touched

    def edit(self, instruction: str, *, seed: int = 0, progress=None, **overrides) -> EditResult:
        """Edits `image` and makes the result the current turn. A failed edit leaves the session as it was.

        Args:
            instruction, seed, progress: see `Editor.edit`. For other attempts at one turn: `undo`, other seeds.
            overrides: fields of `EditSettings`.

        Raises:
            ValueError: `feather: two_sided`, which changes pixels of CLEAR patches.
        """
        if overrides.get("feather", self.editor.settings.feather) == "two_sided":
            raise ValueError("feather='two_sided' leaks into patches that a session promises to keep; use 'inside'")
        asked = {"num_images": 1, "seed": seed, "progress": progress}
        result = self.editor.edit(self.image, instruction, **asked, **overrides)
        self.turns.append(
            Turn(
                number=len(self.turns) + 1,
                parent=self.current,
                instruction=instruction,
                seed=seed,
                settings=result.settings,
                image=result.image,
                clear=result.clear,
                letterbox=result.letterbox,
            )
        )
        self.current = len(self.turns)
        return result

    def undo(self, n: int = 1) -> None:
        """Goes `n` turns back along `history`; they stay in `turns`, so that `checkout` brings them back."""
        history = self.history
        if not 1 <= n <= len(history):
            raise ValueError(f"undo({n}): expected at least 1 and at most {len(history)}, the turns of the history")
        self.current = history[-n].parent

    def checkout(self, number: int) -> None:
        """Goes to any turn, 0 for the first picture; the next edit begins there."""
        if not 0 <= number <= len(self.turns):
            raise ValueError(f"checkout({number}): expected 0 (the first picture) to {len(self.turns)}")
        self.current = number

    def save(self, folder: str | Path) -> None:
        """Writes every turn's picture as `NNNN-digest.png`, 0000 for the first, and `session.json`.

        `session.json` comes last and at once, so an interrupted call leaves what was saved before. Saved pictures are
        not written again: saving after each turn writes one picture.

        Raises:
            ValueError: the folder holds a session that this one does not continue.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {_name(i, image): image for i, image in enumerate([self.first, *(t.image for t in self.turns)])}
        first, *names = pictures
        turns = [
            {
                "parent": turn.parent,
                "instruction": turn.instruction,
                "seed": turn.seed,
                "settings": turn.settings,
                "picture": name,
                "square": turn.letterbox.size,
                "clear": ["".join("01"[patch] for patch in row) for row in turn.clear.astype(int)],
            }
            for turn, name in zip(self.turns, names)
        ]
        if (folder / SESSION_FILE).exists():
            saved = _read(folder / SESSION_FILE)
            if (saved["first"], saved["turns"]) != (first, turns[: len(saved["turns"])]):
                raise ValueError(
                    f"{folder} holds another session, or turns that this one has not; give another folder, or load it "
                    "and go on from there."
                )
        for name, image in pictures.items():
            if not (folder / name).exists():
                with replacing(folder / name) as temporary:
                    image.save(temporary, format="PNG")
        record = {"format": FORMAT, "first": first, "current": self.current, "turns": turns}
        write_json(folder / SESSION_FILE, record)

    @classmethod
    def load(cls, editor: Editor, folder: str | Path) -> EditSession:
        """Reads what `save` wrote, with the same turn current.

        Raises:
            FileNotFoundError: no `session.json` there.
            ValueError: a file that is missing, damaged or not the one that was saved; the message names it.
        """
        folder = Path(folder)
        record = _read(folder / SESSION_FILE)
        session = cls(editor, _picture(folder / record["first"]))
        size = session.first.size
        for number, turn in enumerate(record["turns"], start=1):
            image = _picture(folder / turn["picture"])
            if image.size != size:
                raise ValueError(f"{folder / turn['picture']}: {image.size} pixels, expected {size} as the first has.")
            clear = np.array([[patch == "1" for patch in row] for row in turn["clear"]])
            said = (turn[name] for name in ("parent", "instruction", "seed", "settings"))
            session.turns.append(Turn(number, *said, image, clear, Letterbox(*size, turn["square"])))
        session.checkout(record["current"])
        return session


def _name(number: int, image: Image.Image) -> str:
    return f"{number:04d}-{_digest(image)}.png"


def _digest(image: Image.Image) -> str:
    """Of pixels and colour profile, not of the file, whose bytes depend on who compresses it."""
    profile = image.info.get("icc_profile", b"")
    return hashlib.sha256(repr(image.size).encode() + image.tobytes() + profile).hexdigest()[:16]


def _picture(path: Path) -> Image.Image:
    image = load_photo(path)
    if _digest(image) != PICTURE_NAME.fullmatch(path.name)[1]:
        raise ValueError(f"{path}: not the picture that was saved under this name; restore it from a copy.")
    return image


def _read(path: Path) -> dict:
    """What `session.json` says, checked as far as it goes without the pictures."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path.parent} holds no saved session, there is no {SESSION_FILE} in it.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); is it damaged? Restore it from a copy.") from error

    def expect(holds: bool, found: str) -> None:
        if not holds:
            raise ValueError(f"{path}: {found:.200}. Expected what EditSession.save wrote; restore it from a copy.")

    expect(isinstance(record, dict) and "format" in record, "not a saved session")
    if record["format"] != FORMAT:
        raise ValueError(f"{path}: found format {record['format']!r:.40}, expected {FORMAT}; upgrade thinkclearly.")
    turns, names = record.get("turns"), [record.get("first")]
    expect(isinstance(turns, list), f"'turns' is {turns!r}")
    for number, turn in enumerate(turns, start=1):
        where = f"turn {number}"
        expect(isinstance(turn, dict), f"{where} is {turn!r}")
        for name, kind in FIELDS.items():
            expect(type(turn.get(name)) is kind, f"{where}: '{name}' is {turn.get(name)!r}")
        expect(0 <= turn["parent"] < number, f"{where} follows turn {turn['parent']}")
        rows = turn["clear"]
        grid = all(isinstance(row, str) and len(row) == len(rows) and not row.strip("01") for row in rows)
        expect(grid and len(rows) > 0, f"{where}: 'clear' is no square of 0 and 1: {rows!r}")
        expect(turn["square"] >= max(len(rows), REFERENCE_MIN_SIDE), f"{where}: 'square' is {turn['square']}")
        names.append(turn["picture"])
    for number, name in enumerate(names):
        fits = isinstance(name, str) and PICTURE_NAME.fullmatch(name)
        expect(bool(fits), f"picture {number} is called {name!r}")
    current = record.get("current")
    expect(type(current) is int and 0 <= current <= len(turns), f"'current' is {current!r} of {len(turns)} turns")
    return record
