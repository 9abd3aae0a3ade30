"""A Chameleon of random weights at any size: for tests, and to train a small one from nothing."""

from __future__ import annotations

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedTokenizerBase

from thinkclearly.models.chameleon.checkpoint import chameleon_of
from thinkclearly.models.chameleon.processor import ChameleonProcessor


def random_chameleon(
    sizes: dict,
    vq: dict,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[ChameleonForConditionalGeneration, ChameleonProcessor]:
    """A model as transformers initialises it, and its processor.

    Args:
        sizes: of the language model, fields of `ChameleonConfig`.
        vq: of the image tokenizer, fields of `ChameleonVQVAEConfig`: `resolution` (pixels of a side),
            `channel_multiplier` (of L levels; the grid has resolution / 2^(L - 1) patches a side), `num_embeddings`
            (K), `embed_dim`, `latent_channels`, `base_channels` (a multiple of 32), `num_res_blocks`.
        tokenizer: holds the special tokens and K names of codes; see `ChameleonProcessor`.
    """
    side, levels = vq["resolution"], len(vq["channel_multiplier"])
    processor = ChameleonProcessor(tokenizer, side, (side // 2 ** (levels - 1)) ** 2)
    vocabulary = tokenizer.get_vocab()
    ids = {"bos_token_id": processor.bos_id, "eos_token_id": processor.eos_id, "pad_token_id": processor.pad_id}
    config = ChameleonConfig(
        **{"vocab_size": max(vocabulary.values()) + 1, **ids, **sizes}, vq_config=vq, vocabulary_map=vocabulary
    )
    config.boi_token_id, config.eoi_token_id = processor.boi_id, processor.eoi_id
    torch.manual_seed(seed)
    with torch.device(device):
        network = chameleon_of(config, "The config")
    network.to(dtype).model.vqmodel.float().requires_grad_(False)
    return network.eval(), processor
