"""The instruction vocabulary: image-head classes after the K codes, each saying "this patch is transform(source)".

A vocabulary is a table. Its only row now is CLEAR, whose transform is the identity; a further token is a further row.
Knows nothing of models or prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

TRANSFORMS: dict[str, Callable[[Image.Image], Image.Image]] = {"CLEAR": lambda picture: picture}


@dataclass(frozen=True)
class InstructionVocabulary:
    """Instruction token number i has class id `codebook_size + i` in the widened image head.

    Args:
        codebook_size (`int`): K, the number of real codes.
        names (`tuple[str, ...]`, *optional*, defaults to `("CLEAR",)`): names of the rows, known to `TRANSFORMS`.
    """

    codebook_size: int
    names: tuple[str, ...] = ("CLEAR",)

    def __post_init__(self):
        unknown = [name for name in self.names if name not in TRANSFORMS]
        if unknown:
            raise ValueError(f"Unknown instruction tokens {unknown}; this version knows {sorted(TRANSFORMS)}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return self.codebook_size + len(self.names)

    def is_instruction(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool, the shape of `ids`: True where the class is an instruction and not a code."""
        return ids >= self.codebook_size

    def label(self, target_tokens: torch.Tensor, holds: torch.Tensor) -> torch.Tensor:
        """Class ids (..., N): the instruction where it holds, else the target's code; the first row that holds wins.

        Args:
            target_tokens: long (..., N), codes of the target.
            holds: bool (..., I, N), where the target equals each instruction's transform of the source.
        """
        labels = target_tokens
        for i in reversed(range(len(self))):
            labels = torch.where(holds[..., i, :], self.codebook_size + i, labels)
        return labels

    def remap(self, ids: torch.Tensor, transformed: torch.Tensor) -> torch.Tensor:
        """Codes (..., N) for the way back into the model and for decoding: instructions become their patch's code.

        Args:
            ids: long (..., N), classes.
            transformed: long (..., I, N), codes of each instruction's transform of the source.
        """
        row = (ids - self.codebook_size).clamp(min=0).unsqueeze(-2)
        return torch.where(self.is_instruction(ids), transformed.gather(-2, row).squeeze(-2), ids)


def gate_log_odds(logits: torch.Tensor, codebook_size: int, clear_weight: float = 1.0) -> torch.Tensor:
    """Log-odds of copying against painting, without guidance: (..., K + I) to (...).

    Weighted cross-entropy is minimised by q_k ∝ w_k·p_k, so the class weight's logarithm is taken off again.
    """
    copy = torch.logsumexp(logits[..., codebook_size:], dim=-1)
    return copy - torch.logsumexp(logits[..., :codebook_size], dim=-1) - math.log(clear_weight)
