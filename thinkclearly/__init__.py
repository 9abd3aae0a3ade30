"""ThinkClearly: picture editing with instruction tokens; what nobody asked to change stays the source's own bytes."""

from importlib import import_module

from thinkclearly.hub.on_import import register_with_pipelines

__version__ = "0.1.0"
# Imported when first asked for: torch and transformers take seconds, which `thinkclearly --help` need not wait for.
_HOMES = {
    "ClearEditTrainer": "training.clear",
    "EditResult": "editing.result",
    "EditSession": "editing.session",
    "EditSettings": "editing.settings",
    "Editor": "editing.editor",
    "Thought": "generation.think",
    "ThoughtSettings": "decoding.thought_settings",
    "prepare_dataset": "data.prepare",
    "register_instruction": "instructions",
}
__all__ = [*_HOMES, "load_editor", "load_model"]
register_with_pipelines()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_editor(name_or_path: str, **kwargs) -> "Editor":  # noqa: F821
    """An editor from a fine-tune: a folder or Hub id, ours or the original's directory format.

    Args:
        name_or_path: the fine-tune. A missing or mismatched CLEAR head is an error.
        kwargs: `base`, `dtype`, `device`, `revision`, `token`, …; see `load_clear_model`.
    """
    from thinkclearly.editing.editor import Editor
    from thinkclearly.models.finetunes import load_clear_model

    return Editor(*load_clear_model(name_or_path, **{"merge": True} | kwargs))


def load_model(name_or_path: str, **kwargs) -> "Editor":  # noqa: F821
    """A base model or a fine-tune of any family, with `edit`, `generate`, `describe` and `think`.

    Args:
        name_or_path: folder or Hub id; "tiny" is the base that ships along.
        kwargs: `dtype`, `device`, `revision`, `token`, …; see `load_checkpoint`.
    """
    from thinkclearly.editing.editor import Editor
    from thinkclearly.models.finetunes import load_any

    return Editor(*load_any(name_or_path, **kwargs))
