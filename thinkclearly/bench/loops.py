"""What our decoder is compared with: the reference loop, one token a pass, and transformers' own text-to-image.

Knows nothing of clocks, and nothing of the decoder it is compared with.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, GenerationConfig, JanusForConditionalGeneration

from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor
from thinkclearly.sequence import Row, drawing


@torch.inference_mode()
def reference_loop(
    model: InstructionModel,
    embeds: torch.Tensor,
    num_tokens: int,
    *,
    source_tokens: torch.Tensor | None = None,
    cfg_weight: float = 5.0,
    cfg_weight2: float = 5.0,
    temperature: float = 1.0,
) -> tuple[list[int], list[int]]:
    """One picture as Janus-4o (demo/app_janus4o.py) and ThinkClearly (4_simple_inference.py) decode it.

    A cache that grows by concatenation, all guidance rows in every pass, one token a pass, and a read of that token by
    the host. With `temperature` 0 it takes the best class, as guidance="joint" of our decoder does.

    Args:
        embeds: (R, L, H), rows of one length: full, no_source, uncond for an edit, as the demos always run it; full,
            uncond for an edit with `cfg_weight2` 0 (the same tokens) and for text-to-image.
        source_tokens: long (N,), the codes that instruction tokens stand for; without it only codes are chosen.

    Returns:
        classes in [0, K + I) and the tokens that were fed back, N each.
    """
    codes, ids, tokens, cache = model.vocabulary.codebook_size, [], [], DynamicCache()
    for i in range(num_tokens):
        output = model.token_model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        logits = model.logits(output.last_hidden_state[:, -1])
        if source_tokens is None:
            logits = logits[:, :codes]
        wanted, uncond = logits[0], logits[-1]
        if len(logits) == 3:
            wanted = (wanted + cfg_weight2 * logits[1]) / (1 + cfg_weight2)
        logits = uncond + cfg_weight * (wanted - uncond)
        if temperature > 0:
            chosen = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1).item()
        else:
            chosen = logits.argmax().item()
        ids.append(chosen)
        tokens.append(chosen if chosen < codes else source_tokens[i].item())
        fed = torch.full((len(embeds), 1), tokens[-1], device=embeds.device)
        embeds = model.token_model.embed_codes(fed).to(embeds.dtype)
    return ids, tokens


def transformers_generate(
    janus: JanusForConditionalGeneration,
    processor: Processor,
    prompt: str,
    *,
    cfg_weight: float = 5.0,
    temperature: float = 1.0,
) -> list[int]:
    """The tokens of one picture by `generate(generation_mode="image")`, from the prompt that we use ourselves."""
    rows = processor.rows([Row(drawing(prompt))]).to(janus.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    config = GenerationConfig(
        guidance_scale=cfg_weight,
        bos_token_id=processor.bos_id,
        pad_token_id=processor.pad_id,
        eos_token_id=processor.eos_id,
        generation_kwargs={"boi_token_id": processor.boi_id},
        **sampling,
    )
    tokens = janus.generate(
        inputs=rows.input_ids, attention_mask=rows.attention_mask, generation_mode="image", generation_config=config
    )
    return tokens[0].tolist()
