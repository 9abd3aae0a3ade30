"""What the decoder's choices were worth: log-probabilities of drawn classes, teacher-forced and with a gradient.

The same guidance, temperature and gate as in `engine`, in float32 and by chunks. Does not know what they are for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from thinkclearly.decoding.guidance import guide
from thinkclearly.decoding.settings import PREFERENCES, DecodeSettings
from thinkclearly.models.cross_entropy import by_chunks
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.sequence import FULL


@dataclass
class Actions(ModelOutput):
    """Of S samples with N positions; only `logps` has a gradient.

    Attributes:
        logps: float32 (S, N), log-probability of what was drawn, in nats. Of a copied patch it is the gate's alone:
            its code was not drawn.
        entropy: float32 (S, N), of the codes' distribution, in nats; 0 where the patch is copied.
    """

    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """Scores what `decode` drew under the same settings; the `score` of `InstructionModel.forward`.

    Args:
        settings: temperature, gate and its preference.
        rows: name → weight of the rows; those of a sample lie next to each other in the batch.
        scale: the guided logits are divided by it; 1 gives the distribution that was drawn from.
        copies: whether instructions can be drawn.
    """

    settings: DecodeSettings
    rows: dict[str, float] = field(default_factory=lambda: {FULL: 1.0})
    scale: float = 1.0
    copies: bool = False

    def __call__(self, model: InstructionModel, hidden: torch.Tensor, labels: torch.Tensor) -> Actions:
        """Hidden states (S·R, N, H) and class ids, long (S·R, N), the same for all rows of a sample."""
        count = len(self.rows)
        states = hidden.unflatten(0, (-1, count)).transpose(1, 2).flatten(0, 1)  # (S·N, R, H)
        drawn = labels[::count]
        found = by_chunks(partial(self._score, model), states, drawn.flatten(), rows=count)
        return Actions(*(part.view_as(drawn) for part in found))

    def _score(self, model, states: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = dict(zip(self.rows, model.logits(states).unbind(1)))
        codes = guide(rows, self.rows)[:, : model.vocabulary.codebook_size]
        codes = codes / (self.scale * self.settings.temperature)
        copied = model.vocabulary.is_instruction(drawn)
        gate = None
        if self.copies:
            gate = operating_point(model.gate(rows[FULL]), self.settings)
        logps = choice_logps(codes, torch.where(copied, 0, drawn), copied, gate)
        with torch.no_grad():
            every = F.log_softmax(codes, dim=-1)
            entropy = torch.where(copied, 0.0, -(every.exp() * every).sum(-1))
        return logps, entropy


def operating_point(gate: torch.Tensor, settings: DecodeSettings) -> torch.Tensor:
    """Calibrated log-odds of copying, moved by what `prefer` and `clear_bias` ask for."""
    return gate - PREFERENCES[settings.prefer] + settings.clear_bias


def choice_logps(
    codes: torch.Tensor, drawn: torch.Tensor, copied: torch.Tensor, gate: torch.Tensor | None
) -> torch.Tensor:
    """Log-probability of each choice, float32 (M,).

    Args:
        codes: (M, K), logits of the codes' distribution.
        drawn: long (M,), the code, of no meaning where the patch is copied.
        copied: bool (M,).
        gate: (M,), log-odds of copying where the gate was drawn; None where it was not: then copying is certain.
    """
    logps = F.log_softmax(codes, dim=-1).gather(1, drawn[:, None]).squeeze(1)
    logps = torch.where(copied, 0.0, logps)
    return logps if gate is None else logps + F.logsigmoid(torch.where(copied, gate, -gate))
