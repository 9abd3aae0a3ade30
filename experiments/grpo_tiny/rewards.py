"""A reward of one's own, as `--own_rewards` takes it."""

from __future__ import annotations

from PIL import Image

from thinkclearly.data.shapes import ShapeEdit


def done(prompts: list[str], completions: list[Image.Image], edit: list[str], **columns) -> list[float]:
    """1 where the edit is done, whatever became of the rest."""
    return [float(ShapeEdit.from_json(text).is_done(picture)) for picture, text in zip(completions, edit)]
