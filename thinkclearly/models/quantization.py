"""Weights in 8 or 4 bits. Knows nothing of files, nor which parts a family spares."""

from __future__ import annotations

import copy
import logging

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoQuantizationConfig


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


def spare(config, modules: list[str]):
    """A copy of a quantization config of transformers, or of its dict, that spares these modules.

    Where it names `llm_int8_skip_modules` itself, or knows no such thing, it stays the same.
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    if getattr(config, "llm_int8_skip_modules", ()) is None:
        config.llm_int8_skip_modules = modules
    return config
