"""The pipeline of this fine-tune, for processes that import only transformers; the work is done by thinkclearly.

pipeline("clear-edit", model="you/name", config="you/name", trust_remote_code=True)
"""

import transformers

try:
    from thinkclearly.hub.pipeline import ClearEditLoader, ClearEditPipeline
except ImportError as error:
    raise ImportError(
        "This model edits pictures with instruction tokens and needs ThinkClearly, which is not on PyPI: run "
        "`pip install .` in a checkout of its source"
    ) from error

__all__ = ["ClearEditPipeline"]

# pipeline() looks the architecture that config.json names up in transformers.
transformers.ClearEditModel = ClearEditLoader
