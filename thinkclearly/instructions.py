"""The instruction vocabulary: image-head classes after the K codes, each saying "this patch is transform(source)".

A vocabulary is a table of names and transforms. CLEAR's transform is the identity; `register_instruction` adds a row,
and everything from preparation to the composite follows it. Knows nothing of models or prompts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

CLEAR = "CLEAR"
TRANSFORMS: dict[str, Callable[[Image.Image], Image.Image]] = {CLEAR: lambda picture: picture}


def register_instruction(name: str, transform: Callable[[Image.Image], Image.Image]) -> None:
    """Adds an instruction token that recipes can name in `instructions`.

    Args:
        name: capitals, digits and underscores, e.g. "BLUR"; written `<BLUR>` in JSONL files.
        transform: a picture, RGB or RGBA, to another of the same size and mode, the same for the same bytes. It sees
            the source at its own resolution; the model sees the result in its square.

    Raises:
        ValueError: the name is taken or is not one.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
        raise ValueError(f"instruction {name!r}: expected capitals, digits and underscores, e.g. 'BLUR'")
    if name in TRANSFORMS:
        raise ValueError(f"instruction {name!r} is registered already; choose another name")
    TRANSFORMS[name] = transform


@dataclass(frozen=True)
class InstructionVocabulary:
    """Instruction token number i has class id `codebook_size + i` in the widened image head.

    Args:
        codebook_size (`int`): K, the number of real codes.
        names (`tuple[str, ...]`, *optional*, defaults to `("CLEAR",)`): names of the rows, known to `TRANSFORMS`.
    """

    codebook_size: int
    names: tuple[str, ...] = (CLEAR,)

    def __post_init__(self):
        unknown = [name for name in self.names if name not in TRANSFORMS]
        if unknown:
            raise ValueError(
                f"Unknown instruction tokens {unknown}; known are {sorted(TRANSFORMS)}. Others have to be added with "
                "thinkclearly.register_instruction before the data or the model are loaded."
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return self.codebook_size + len(self.names)

    def transforms(self, source: Image.Image) -> list[Image.Image]:
        """What each instruction makes of the source: I pictures of its size and mode.

        Raises:
            ValueError: a transform changed one of them.
        """
        pictures = [TRANSFORMS[name](source) for name in self.names]
        for name, picture in zip(self.names, pictures):
            if (picture.size, picture.mode) != (source.size, source.mode):
                raise ValueError(
                    f"instruction {name}: its transform made {picture.size}, {picture.mode} of {source.size}, "
                    f"{source.mode}; it must keep both, since patches stay in place"
                )
        return pictures

    def transforms_seen(self) -> dict[str, str]:
        """What data must have been prepared with: name → digest of what the transform makes of one fixed picture.

        Empty where CLEAR is the only row: then the source's codes say all.
        """
        if self.names in ((), (CLEAR,)):
            return {}
        made = self.transforms(Image.frombytes("RGB", (64, 64), hashlib.shake_128(b"").digest(3 * 64 * 64)))
        return {name: hashlib.sha256(each.tobytes()).hexdigest()[:16] for name, each in zip(self.names, made)}

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Long, the shape of `ids`: number of the instruction, -1 where the class is a code."""
        return (ids - self.codebook_size).clamp(min=-1)

    def is_instruction(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool, the shape of `ids`: True where the class is an instruction and not a code."""
        return ids >= self.codebook_size

    def says(self, ids: torch.Tensor, name: str) -> torch.Tensor:
        """Bool, the shape of `ids`: True where the class is this instruction; nowhere if the vocabulary lacks it."""
        row = self.names.index(name) if name in self.names else len(self)
        return ids == self.codebook_size + row

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

    def weights(self, labels: torch.Tensor, instruction_weight: float) -> torch.Tensor:
        """Class weight of each label: `instruction_weight` for instructions, 1 for codes; float32."""
        return torch.where(self.is_instruction(labels), instruction_weight, 1.0)

    def remap(self, ids: torch.Tensor, transformed: torch.Tensor) -> torch.Tensor:
        """Codes (..., N) for the way back into the model and for decoding: instructions become their patch's code.

        Args:
            ids: long (..., N), classes.
            transformed: long (..., I, N), codes of each instruction's transform of the source.
        """
        if not len(self):
            return ids
        row = self.rows(ids).clamp(min=0).unsqueeze(-2)
        return torch.where(self.is_instruction(ids), transformed.gather(-2, row).squeeze(-2), ids)


def gate_log_odds(logits: torch.Tensor, codebook_size: int, clear_weight: float = 1.0) -> torch.Tensor:
    """Log-odds of copying against painting, without guidance: (..., K + I) to (...).

    Weighted cross-entropy is minimised by q_k ∝ w_k·p_k, so the class weight's logarithm is taken off again.
    """
    copy = torch.logsumexp(logits[..., codebook_size:], dim=-1)
    return copy - torch.logsumexp(logits[..., :codebook_size], dim=-1) - math.log(clear_weight)
