"""The image tokenizer computes in float32, whatever the process is set to."""

import pytest
import torch

from thinkclearly.models.janus.checkpoint import _full_precision


@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_tf32_is_off_while_the_tokenizer_runs_on_cuda_and_back_afterwards(before):
    kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    were = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = before
        with _full_precision(torch.device("cuda")), _full_precision(torch.device("cuda")):
            assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee"]
        assert [kind.fp32_precision for kind in kinds] == [before, before]
    finally:
        for kind, precision in zip(kinds, were):
            kind.fp32_precision = precision
