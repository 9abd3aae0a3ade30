import os
from pathlib import Path

import pytest
from hub_server import HubServer
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def golden() -> Path:
    """The tiny reference checkpoint and its expected values."""
    return Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "fixtures" / "janus_tiny"))


@pytest.fixture(scope="session")
def expected(golden) -> dict:
    """What DeepSeek's own classes make of the golden checkpoint."""
    return load_file(golden / "expected.safetensors")


@pytest.fixture(scope="session")
def weights(golden) -> dict:
    """The tensors of the golden checkpoint, in DeepSeek's layout."""
    return load_file(golden / "checkpoint" / "model.safetensors")


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A cache of `datasets` that no other test has filled."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def hub(tmp_path_factory):
    """A Hub on this machine, empty."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server
