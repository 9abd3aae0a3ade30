"""A Janus of random weights at any size, for what can be measured without trained ones."""

from __future__ import annotations

import torch
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

from thinkclearly.models.folder import TINY
from thinkclearly.models.janus.processor import JanusProcessor


def random_janus(
    sizes: dict,
    grid: int,
    codes: int,
    towers: tuple[dict, dict],
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int,
) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """A model whose codes depend on each other, and a processor with the shipped tokenizer.

    Args:
        sizes: of the language model, fields of `LlamaConfig`.
        grid: patches of 16 pixels along a side of a picture.
        codes: K.
        towers: fields of the vision tower's and the image tokenizer's configurations.
    """
    width, side, (vision, vq) = sizes["hidden_size"], 16 * grid, towers
    config = JanusConfig(
        text_config=LlamaConfig(**{"vocab_size": 102400, "max_position_embeddings": 16384} | sizes),
        vision_config={"image_size": side, "num_image_tokens": grid**2, "projection_dim": width, **vision},
        vq_config={"num_embeddings": codes, "projection_dim": width, "image_token_embed_dim": width, **vq},
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        janus = JanusForConditionalGeneration(config)
    # As initialised, the codes that are fed back are all but zero, and none would depend on another.
    aligner, every = janus.model.generation_aligner.hidden_layers[-1], torch.arange(codes, device=device)[None]
    with torch.no_grad():
        aligner.weight /= janus.prepare_embeddings_for_image_generation(every).std()
        head = janus.model.generation_head  # logits of codes of standard deviation 1
        head.vision_head.weight /= head(torch.randn(256, width, device=device)).std()
    janus.to(dtype).model.vqmodel.float()
    return janus, JanusProcessor(JanusProcessor.from_pretrained(str(TINY)).tokenizer, side, grid**2)
