"""A benchmark's prompts thought about: the first and the last picture of each thought, as two folders of pictures.

Knows how the pictures are named. Knows nothing of benchmarks or of what a picture is judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from thinkclearly.data import thought_files
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.thoughts import THOUGHTS_FILE, think_prompts
from thinkclearly.evaluation.benchmarks.drawing import Prompt
from thinkclearly.evaluation.thought_pages import write_pages
from thinkclearly.files import replacing

FIRST, LAST, THOUGHTS = "first", "last", "thoughts"


def think_ends(
    editor: Editor, prompts: Sequence[Prompt], folder: Path, settings: ThoughtSettings, **options
) -> int | None:
    """Thinks about every prompt as often as it has files, into `thoughts/`; then `first/` and `last/` hold the ends.

    Args:
        options: of `think_prompts`: `run`, `batch_size`, `seed`.

    Returns:
        `int`: thoughts that ended without a picture; a black one stands for theirs. `None` in other processes than
        the first.

    Raises:
        ValueError: as `think_prompts`.
    """
    asked = [thought_files.Prompt(prompt.text) for prompt in prompts]
    count = len(prompts[0].files)
    think_prompts(editor, asked, folder / THOUGHTS, settings, num_thoughts=count, **options)
    if not PartialState().is_main_process:
        return None
    write_pages(folder / THOUGHTS, THOUGHTS_FILE)
    side, without = editor.processor.image_size, 0
    thoughts = thought_files.read_decoded(folder / THOUGHTS / THOUGHTS_FILE)
    for thought, name in zip(thoughts, (name for prompt in prompts for name in prompt.files)):
        found = [folder / THOUGHTS / path for path in thought["image_paths"] if path is not None]
        without += not found
        for end, path in zip((FIRST, LAST), (found[0], found[-1]) if found else (None, None)):
            picture = Image.new("RGB", (side, side)) if path is None else Image.open(path)
            with replacing(folder / end / name) as temporary:
                picture.save(temporary, format="PNG")
    return without
