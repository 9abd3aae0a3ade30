"""Words to pictures: a batch of prompts, decoded in one loop.

Knows rows and codes. Does not know editing, nor where the prompts come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from thinkclearly.decoding.engine import Decoded, decode, guided_rows
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.images import to_image
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor
from thinkclearly.sequence import drawing, named_rows


@torch.inference_mode()
def draw(
    model: InstructionModel,
    processor: Processor,
    prompts: Sequence[str],
    settings: DecodeSettings,
    *,
    samples: Sequence[tuple[int, int]],
    on_step: Callable[[int], None] | None = None,
    **options,
) -> Decoded:
    """Draws S / P samples of each of P prompts; a prompt is read once for all of its samples.

    Args:
        samples: (seed, sample number) of each of the S samples, which key its noise; those of a prompt lie next to
            each other.
        on_step: called with the number of positions done after each pass.
        options: `decode`'s other ones.

    Raises:
        ValueError: an empty prompt.
    """
    words = [prompt.strip() for prompt in prompts]
    if not all(words):
        raise ValueError(f"Prompt {words.index('')} is empty; describe the picture to draw")
    weights = guided_rows(settings, has_source=False)
    rows = processor.rows(named_rows(map(drawing, words), weights)).to(model.device)
    return decode(
        model,
        model.token_model.embed_prompt(rows),
        rows.attention_mask,
        processor.num_image_tokens,
        settings,
        rows=weights,
        samples=samples,
        per_prompt=len(samples) // len(words),
        on_step=on_step,
        **options,
    )


@torch.no_grad()
def to_pictures(model: InstructionModel, codes: torch.Tensor) -> list[Image.Image]:
    """Codes, long (B, N), as RGB pictures of the model's own size."""
    return [to_image(pixels) for pixels in model.token_model.decode(codes).cpu()]
