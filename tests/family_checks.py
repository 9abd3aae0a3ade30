"""What every model family keeps: the same checks for each, called by the family's own test file.

A family gives a `Checkpoint` whose network is a real class at tiny size.
"""

from __future__ import annotations

import torch
from janus_reference import between

from thinkclearly.decoding.engine import decode, guided_rows
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.load import Checkpoint
from thinkclearly.models.protocol import TokenModel
from thinkclearly.sequence import drawing, named_row


def pixels_of(checkpoint: Checkpoint, count: int = 2) -> torch.Tensor:
    side = checkpoint.processor.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def check_sizes(checkpoint: Checkpoint) -> None:
    family: TokenModel = checkpoint.token_model
    n = checkpoint.processor.num_image_tokens
    assert family.grid**2 == n and family.hidden_size == family.language_model.config.hidden_size
    codes = family.encode(pixels_of(checkpoint))
    assert codes.shape == (2, n) and codes.dtype == torch.long
    assert 0 <= int(codes.min()) and int(codes.max()) < family.codebook_size


def check_pictures_survive_their_codes(checkpoint: Checkpoint) -> None:
    """Decoding and encoding again settles: a decoded picture keeps most of its codes."""
    family = checkpoint.token_model
    codes = family.encode(pixels_of(checkpoint))
    pictures = family.decode(codes)
    side = checkpoint.processor.image_size
    assert pictures.shape == (2, 3, side, side) and pictures.dtype == torch.float32
    assert torch.equal(family.decode(codes), pictures)


def check_embeddings_and_logits(checkpoint: Checkpoint) -> None:
    family = checkpoint.token_model
    codes = family.encode(pixels_of(checkpoint))
    embeds = family.embed_codes(codes)
    assert embeds.shape == (*codes.shape, family.hidden_size)
    torch.testing.assert_close(family.embed_codes(codes[:, 3:4]), embeds[:, 3:4])
    assert family.code_logits(embeds).shape == (*codes.shape, family.codebook_size)
    assert family.code_logits(embeds).dtype == family.word_logits(embeds).dtype == torch.float32


def check_prompts_fill_their_slots(checkpoint: Checkpoint) -> None:
    """What a row withholds leaves no trace in it, and what it shows does.

    A family without an understanding tower sees a picture by its codes: without them it shows nothing of it.
    """
    family, processor = checkpoint.token_model, checkpoint.processor
    pixels = pixels_of(checkpoint)
    sample = drawing("Make it blue.", [0])
    prompt = processor.rows([named_row(sample, name) for name in ("full", "no_source", "uncond")])
    with torch.no_grad():
        one, other = (
            family.embed_prompt(prompt, family.see(picture), family.encode(picture)) for picture in pixels.split(1)
        )
    assert one.shape == (*prompt.input_ids.shape, family.hidden_size)
    changed = (one != other).flatten(1).any(1).tolist()
    assert changed == [True, family.tower_part != family.tokenizer_part, False]
    assert (one[0] != one[1]).any()


@torch.no_grad()
def check_blocks_are_lossless(checkpoint: Checkpoint) -> None:
    """A pass that checks a block of drafts gives the codes that one pass a code does."""
    model = InstructionModel(checkpoint.network, ClearConfig(checkpoint.token_model.codebook_size)).eval()
    torch.nn.init.normal_(model.clear_head.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    family, processor = model.token_model, checkpoint.processor
    pixels = pixels_of(checkpoint)
    codes, n = family.encode(pixels), processor.num_image_tokens
    found, bias = [], 0.0
    for run, block in enumerate((1, 1, 0, 5)):
        if run == 1:  # the first one told how likely copying is
            bias = -between(found.pop().gate)
        settings = DecodeSettings(block=block, temperature=0.9, cfg_weight=2.0, cfg_weight2=1.0, clear_bias=bias)
        rows = guided_rows(settings, has_source=True)
        prompt = processor.rows(
            [named_row(drawing(w, [i]), r) for i, w in enumerate(("Red.", "Blue it.")) for r in rows]
        )
        found.append(
            decode(
                model,
                family.embed_prompt(prompt, family.see(pixels), codes),
                prompt.attention_mask,
                n,
                settings,
                rows=rows,
                samples=[(0, 0), (0, 1)],
                source_tokens=codes,
                transformed=codes.unsqueeze(1),
            )
        )
    one_by_one, *blocks = found
    assert one_by_one.passes == n
    copied = model.vocabulary.is_instruction(one_by_one.class_ids)
    assert copied.any() and not copied.all()
    for decoded in blocks:
        assert torch.equal(decoded.class_ids, one_by_one.class_ids) and decoded.passes <= n


def check_parts_hold_every_weight_once(checkpoint: Checkpoint) -> None:
    family = checkpoint.token_model
    inside = [id(p) for part in family.parts().values() for p in part.parameters()]
    assert len(inside) == len(set(inside)) and set(inside) == {id(p) for p in family.network.parameters()}
    assert {*family.learning_parts, family.tokenizer_part, family.tower_part} <= set(family.parts())


def check_fingerprints_tell_weights_apart(checkpoint: Checkpoint) -> None:
    family = checkpoint.token_model
    before = family.codebook_fingerprint(), family.base_fingerprint()
    assert before == (family.codebook_fingerprint(), family.base_fingerprint())
    weight = next(p for n, p in family.parts()[family.learning_parts[0]].named_parameters() if "norm" in n)
    with torch.no_grad():
        weight.mul_(1.5)
        try:
            assert family.codebook_fingerprint() == before[0] and family.base_fingerprint() != before[1]
        finally:
            weight.div_(1.5)


def check_what_is_saved_is_what_is_loaded(checkpoint: Checkpoint, load, directory) -> None:
    model = InstructionModel(checkpoint.network, ClearConfig(checkpoint.token_model.codebook_size))
    model.save_pretrained(directory)
    checkpoint.processor.save_pretrained(directory)
    again = load(str(directory))
    for name, tensor in checkpoint.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    assert again.token_model.base_fingerprint() == checkpoint.token_model.base_fingerprint()


CHECKS = [
    check_sizes,
    check_pictures_survive_their_codes,
    check_embeddings_and_logits,
    check_prompts_fill_their_slots,
    check_blocks_are_lossless,
    check_parts_hold_every_weight_once,
    check_fingerprints_tell_weights_apart,
]
