"""Makes "clear-edit" known to `transformers.pipeline` without importing transformers for those who never call it."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

_PIPELINES, _OURS = "transformers.pipelines", "thinkclearly.hub.pipeline"


class _AfterPipelines(MetaPathFinder):
    """Imports our pipeline, which registers itself, as soon as transformers' own are there."""

    def find_spec(self, name, path, target=None):
        spec = PathFinder.find_spec(name, path) if name == _PIPELINES else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                import_module(_OURS)

            spec.loader.exec_module = exec_module
        return spec


def register_with_pipelines() -> None:
    """Registers now if transformers' pipelines are imported already, else when they are."""
    if _PIPELINES in sys.modules:
        import_module(_OURS)
    else:
        sys.meta_path.insert(0, _AfterPipelines())
