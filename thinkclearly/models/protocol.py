"""What decoding, losses, preparation and editing may ask of a model family. Nothing else reaches into a model.

A family is a folder beside this file: a class that fulfils `TokenModel`, its processor, and its checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thinkclearly.sequence import Row


@dataclass
class PromptBatch:
    """Left-padded rows, ready to be embedded. B rows, L positions, at most P pictures a row.

    Attributes:
        input_ids: long (B, L).
        attention_mask: long (B, L), 0 on the left padding. PAD ids inside a row (withheld conditions) are attended.
        seen_slots: long (B, P), where a picture's N features go; -1 where the row does not show them.
        known_slots: long (B, P), where a picture's N codes go; -1 where the row does not show them.
        pictures: long (B, P), which of the batch's pictures fills the slots.
        drawn_slots: long (B,), where the N - 1 codes that are fed back go when the whole output is known (training);
            -1 where the row draws nothing, or where the prompt alone was asked for.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    seen_slots: torch.Tensor
    known_slots: torch.Tensor
    pictures: torch.Tensor
    drawn_slots: torch.Tensor

    def to(self, device) -> PromptBatch:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class TokenModel(Protocol):
    """A model that reads words and pictures and draws pictures as codes. K codes, N = grid² of them a picture.

    Attributes:
        network: transformers' own model, with LoRA layers inside where there are any.
        language_model: `inputs_embeds`, `attention_mask`, `position_ids` and a `Cache` to hidden states (B, L, H).
        codebook_size: K.
        hidden_size: H.
        grid, image_size: patches and pixels along a side of a picture.
        learning_parts: names among `parts()` of what LoRA adapts and full fine-tuning trains unless told otherwise.
        tokenizer_part, tower_part: names among `parts()` of the image tokenizer, which never learns, and of what `see`
            runs: the same where a family has no tower, and sees a picture by its codes.
    """

    network: PreTrainedModel
    language_model: PreTrainedModel
    codebook_size: int
    hidden_size: int
    grid: int
    image_size: int
    learning_parts: tuple[str, ...]
    tokenizer_part: str
    tower_part: str

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures, float (B, 3, S, S) in [-1, 1], to codes, long (B, N), row by row of the grid."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes, long (B, N), to pictures, float32 (B, 3, S, S), about [-1, 1], not clipped."""

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures, float (B, 3, S, S), to what the understanding tower makes of them: (B, N, W).

        Without a tower, the embeddings of their codes.
        """

    def embed_prompt(
        self, prompt: PromptBatch, features: torch.Tensor | None = None, codes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows (B, L, H) with features (M, N, W) and codes (M, N) of the batch's M pictures in their slots."""

    def embed_words(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids, long (B, L), as the language model reads them: (B, L, H)."""

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes, long (B, n), as the language model reads them: (B, n, H)."""

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., H) to logits of the codes, float32 (..., K)."""

    def word_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., H) to logits of words, float32 (..., V)."""

    def parts(self) -> dict[str, nn.Module]:
        """Name to module, every weight in exactly one of them: for LoRA, full training, quantization, memory."""

    def codebook_fingerprint(self) -> str:
        """Names the codebook: codes of another one mean other pictures."""

    def base_fingerprint(self) -> str:
        """Names the weights under an adapter; "" where they are rounded in a way that hides which they are."""


class Processor(Protocol):
    """Pictures to pixel values and segments to token ids, as the family's models were trained on them.

    Attributes:
        image_size: side of the model's square pictures, pixels.
        num_image_tokens, grid: N = grid², codes of a picture.
        bos_id, eos_id, pad_id, boi_id, eoi_id, image_id: token ids: of the beginning and the end of a text, padding,
            the beginning and the end of a picture, and a place for what a picture is read as.
        unsaid_ids: token ids that an answer in words must not have: codes of pictures, where they share a vocabulary.
        sees_codes: whether pictures are seen by their codes alone; who has these then needs no pixels.
        image_mean, image_std: normalisation of the channels.
    """

    tokenizer: PreTrainedTokenizerBase
    image_size: int
    num_image_tokens: int
    grid: int
    bos_id: int
    eos_id: int
    pad_id: int
    boi_id: int
    eoi_id: int
    image_id: int
    unsaid_ids: list[int]
    sees_codes: bool
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def pixel_values(self, squares) -> torch.Tensor:
        """Square PIL pictures of the model's size to float32 (B, 3, S, S)."""

    def rows(self, rows: Sequence[Row], outputs: bool = False) -> PromptBatch:
        """Token ids and slots of rows, left-padded to one length.

        Args:
            outputs: also room for what is to be predicted, for teacher forcing: N - 1 codes after the last BOI. An
                answer in words belongs to its sample and is always there.

        Raises:
            ValueError: a row withholds what the family was never trained without.
        """

    def answer_ids(self, answer: str) -> list[int]:
        """What follows the prompt of a question: the words and the end of the turn."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes tokenizer and processor files."""


def fill_pictures(
    embeds: torch.Tensor, prompt: PromptBatch, features: torch.Tensor | None, codes: torch.Tensor | None
) -> torch.Tensor:
    """Writes features and codes of M pictures, embedded, (M, N, H) each, into their slots of embeds (B, L, H)."""
    for slots, values in ((prompt.seen_slots, features), (prompt.known_slots, codes)):
        if values is None:
            continue
        for slot, picture in zip(slots.unbind(1), prompt.pictures.unbind(1)):
            embeds = fill(embeds, slot, values.to(embeds)[picture])
    return embeds


def fill(embeds: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Writes values (B, n, H) into embeds (B, L, H) from each row's slot on; rows with slot -1 stay as they are."""
    n = values.shape[1]
    offset = torch.arange(embeds.shape[1], device=embeds.device) - slots[:, None]
    inside = (slots[:, None] >= 0) & (offset >= 0) & (offset < n)
    index = offset.clamp(0, n - 1).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return torch.where(inside.unsqueeze(-1), values.to(embeds).gather(1, index), embeds)


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, L) that start at 0 on each row's first real token, so left padding changes nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
