"""A picture and a question to words."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext

import torch
from PIL import Image
from transformers import GenerationMixin

from thinkclearly.decoding.cache import masked_attention
from thinkclearly.decoding.settings import DecodeSettings, check_seed
from thinkclearly.images import Letterbox
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor
from thinkclearly.sequence import Row, answering

_RANDOM = threading.Lock()


@torch.inference_mode()
def describe(
    model: InstructionModel,
    processor: Processor,
    picture: Image.Image,
    question: str,
    *,
    num_answers: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Answers a question about a picture, `num_answers` times; temperature 0 decodes greedily."""
    DecodeSettings(temperature=temperature, top_k=top_k, top_p=top_p)  # the same limits, the same messages
    check_seed(seed)
    if temperature == 0 and num_answers > 1:
        raise ValueError(f"num_answers={num_answers} at temperature 0 would all be the same; set a temperature")
    family = model.token_model
    square = Letterbox(*picture.size, processor.image_size).fit(picture)
    rows = processor.rows([Row(answering(question.strip(), [0]))]).to(model.device)
    features = family.see(processor.pixel_values([square]).to(model.device))
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    attention = masked_attention(family.language_model)  # another thread may be editing
    with attention, _random_numbers(seed) if temperature > 0 else nullcontext():
        # Not a family's own generate, which only adds warnings where words are asked for.
        ids = GenerationMixin.generate(
            model.base,
            inputs_embeds=family.embed_prompt(rows, features),
            attention_mask=rows.attention_mask,
            max_new_tokens=max_new_tokens,
            num_return_sequences=num_answers,
            guidance_scale=1.0,  # none
            eos_token_id=processor.eos_id,
            bos_token_id=processor.bos_id,
            pad_token_id=processor.eos_id,
            suppress_tokens=processor.unsaid_ids or None,
            **sampling,
        )
    return [text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


@contextmanager
def _random_numbers(seed: int):
    """The process's random numbers from a seed, for one thread at a time; the caller's come back afterwards."""
    with _RANDOM, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
