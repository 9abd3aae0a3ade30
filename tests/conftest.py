"""Fixtures of all tests, and where reference data lies.

Tests marked `golden` compare with reference data, or run on its checkpoint; they read every size from it.
`GOLDEN_ROOT=folder pytest -m golden` runs them on another set of the layout of tests/fixtures.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import HubServer
from random_chameleons import save, small_chameleon
from safetensors.torch import load_file

from thinkclearly.data import encode
from thinkclearly.models.janus.model import Janus

GOLDEN_ROOT = Path(os.environ.get("GOLDEN_ROOT", Path(__file__).parent / "fixtures"))
if not (GOLDEN_ROOT / "janus_tiny").is_dir():
    raise pytest.UsageError(f"GOLDEN_ROOT={GOLDEN_ROOT} has no folder janus_tiny; see tests/fixtures.")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The tiny reference checkpoint and its expected values."""
    return GOLDEN_ROOT / "janus_tiny"


@pytest.fixture(scope="module")
def one_thread():
    """The order of a sum depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(path.stem for path in (GOLDEN_ROOT / "janus_tiny" / "images").glob("*.png")))
def name(request) -> str:
    """Each picture of the golden set."""
    return request.param


@pytest.fixture(scope="session")
def expected(golden) -> dict:
    """What DeepSeek's own classes make of the golden checkpoint."""
    return load_file(golden / "expected.safetensors")


@pytest.fixture(scope="session")
def expected_finetune(golden) -> dict:
    """What the original's fine-tune makes of it."""
    return load_file(golden / "expected_finetune.safetensors")


@pytest.fixture(scope="session")
def prompts(golden) -> dict:
    """The strings that the expected values belong to."""
    return json.loads((golden / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def weights(golden) -> dict:
    """The tensors of the golden checkpoint, in DeepSeek's layout."""
    return load_file(golden / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="session")
def sizes(golden, weights) -> SimpleNamespace:
    """Sizes of the golden checkpoint: codes, positions, grid (patches a side) and side (pixels)."""
    positions = weights["vision_model.vision_tower.pos_embed"].shape[1]
    side = json.loads((golden / "checkpoint" / "preprocessor_config.json").read_text())["image_size"]
    return SimpleNamespace(
        codes=len(weights["gen_embed.weight"]), positions=positions, grid=math.isqrt(positions), side=side
    )


@pytest.fixture(scope="session")
def chameleon(tmp_path_factory) -> Path:
    """A folder with a small Chameleon of random weights."""
    return save(small_chameleon(), tmp_path_factory.mktemp("chameleon"))


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A cache of `datasets` that no other test has filled."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small_shards(monkeypatch):
    """Two records a shard."""
    monkeypatch.setattr(encode, "SHARD_SIZE", 2)


@pytest.fixture
def encoded_pictures(monkeypatch):
    """How many pictures each call of the tokenizer was given."""
    calls, real = [], Janus.encode

    def counting(janus, pixels):
        calls.append(len(pixels))
        return real(janus, pixels)

    monkeypatch.setattr(Janus, "encode", counting)
    return calls


@pytest.fixture
def hub(tmp_path_factory):
    """A Hub on this machine, empty."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server
