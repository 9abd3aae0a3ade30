"""ThinkClearly: picture editing with instruction tokens; what nobody asked to change stays the source's own bytes."""

from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.result import EditResult, EditSettings
from thinkclearly.editing.session import EditSession

from thinkclearly.training.adapters import load_clear_model
from thinkclearly.training.trainer import ClearEditTrainer

__version__ = "0.1.0"

__all__ = [
    "ClearEditTrainer",
    "EditResult",
    "EditSession",
    "EditSettings",
    "Editor",
    "load_editor",
    "prepare_dataset",
]


def load_editor(name_or_path: str, **kwargs) -> Editor:
    """An editor from a fine-tune: a folder or Hub id, ours or the original's directory format.

    Args:
        name_or_path: the fine-tune. A missing or mismatched CLEAR head is an error.
        kwargs: `base`, `dtype`, `device`, `revision`, `token`, …; see `load_clear_model`.
    """
    return Editor(*load_clear_model(name_or_path, **{"merge": True} | kwargs))
