"""A language model in 8 or 4 bits, by bitsandbytes. Knows nothing of files."""

from __future__ import annotations

import logging

import torch
from transformers import BitsAndBytesConfig


def quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `load_janus` takes as `quantization_config`.

    Args:
        bits: 8 (LLM.int8()) or 4 (NF4 with doubly quantized scales, as QLoRA trains on; arXiv 2305.14314).
        dtype: of everything else, and of the products with 4-bit weights.
    """
    if bits == 8:
        # It multiplies in float16 and says so at every product.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
