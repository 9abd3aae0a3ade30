import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """The tiny reference checkpoint and its expected values."""
    return Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "fixtures" / "janus_tiny"))
