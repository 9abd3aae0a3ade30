"""Janus keeps what every family keeps, and its image tokenizer computes in float32 whatever the process is set to."""

import pytest
import torch
from family_checks import CHECKS, check_what_is_saved_is_what_is_loaded

from thinkclearly.models.exact import full_precision
from thinkclearly.models.load import load_checkpoint


@pytest.fixture(scope="module", params=["golden", "tiny"])
def checkpoint(request, golden):
    return load_checkpoint(str(golden / "checkpoint") if request.param == "golden" else "tiny")


@pytest.mark.golden
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_janus_keeps_what_every_family_keeps(checkpoint, check):
    check(checkpoint)


@pytest.mark.golden
def test_what_is_saved_is_what_is_loaded(checkpoint, tmp_path):
    check_what_is_saved_is_what_is_loaded(checkpoint, load_checkpoint, tmp_path / "saved")


@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_tf32_is_off_while_the_tokenizer_runs_on_cuda_and_back_afterwards(before):
    kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    were = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = before
        with full_precision(torch.device("cuda")), full_precision(torch.device("cuda")):
            assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee"]
        assert [kind.fp32_precision for kind in kinds] == [before, before]
    finally:
        for kind, precision in zip(kinds, were):
            kind.fp32_precision = precision
