import os
from pathlib import Path

import pytest
from hub_server import HubServer


@pytest.fixture(scope="session")
def golden() -> Path:
    """The tiny reference checkpoint and its expected values."""
    return Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "fixtures" / "janus_tiny"))


@pytest.fixture
def hub(tmp_path_factory):
    """A Hub on this machine, empty."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server
