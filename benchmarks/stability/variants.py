"""What is trained for the experiment: the recipe of `recipes/tiny.yaml` with one thing changed at a time.

Knows nothing of decoding or of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from thinkclearly.data.collator import Collator
from thinkclearly.instructions import gate_log_odds
from thinkclearly.training.clear import ClearEditTrainer


class EmptySlotCollator(Collator):
    """The original's: the slot of the picture's features stays as placeholder words."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        batch["seen_slots"] = torch.full_like(batch["seen_slots"], -1)
        return batch


class ClearEverywhereCollator(Collator):
    """Rows that are told nothing keep their CLEAR labels, too."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return super().__call__(rows) | {"labels": torch.tensor([row["output_tokens"] for row in rows])}


class ClearInFullCollator(Collator):
    """Only rows that see the source's codes are labelled CLEAR; part rows are labelled with plain codes."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        plain = self.vocabulary.remap(batch["labels"], batch["transformed"])
        batch["labels"] = torch.where(batch["known_slots"] >= 0, batch["labels"], plain)  # one picture a row
        return batch


class GateLossTrainer(ClearEditTrainer):
    """Adds a supervised loss on the gate alone (Choi 2021, Force-Copy), unweighted, on rows that see the source."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        full = (inputs["known_slots"] >= 0).any(1)
        if model.training and full.any():
            # A second forward pass: the scores of the first one have no gradient at the gate.
            logits = model.teacher_forced_logits(**inputs)[full]
            gate = gate_log_odds(logits, self.vocabulary.codebook_size, self.clear_weight)
            loss = loss + F.binary_cross_entropy_with_logits(
                gate, (inputs["labels"][full] >= self.vocabulary.codebook_size) * 1.0
            )
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True)
class Variant:
    """A way to train; `overrides` are options of the recipe."""

    overrides: dict = field(default_factory=dict)
    collator: type = Collator
    trainer: type = ClearEditTrainer


VARIANTS = {
    "default": Variant(),
    "weight 0.1": Variant({"clear_weight": 0.1}),
    "weight 1": Variant({"clear_weight": 1.0}),
    "weight 3": Variant({"clear_weight": 3.0}),
    "original": Variant({"drop_all": 0, "drop_source": 0, "clear_label": "tokens"}, EmptySlotCollator),
    "label tokens": Variant({"clear_label": "tokens"}),
    "label mask": Variant({"clear_label": "mask"}),
    "no dropout": Variant({"drop_all": 0, "drop_source": 0}),
    "drop source 0.5": Variant({"drop_source": 0.5}),
    "CLEAR in all rows": Variant(collator=ClearEverywhereCollator),
    "CLEAR in full rows": Variant(collator=ClearInFullCollator),
    "gate loss": Variant(trainer=GateLossTrainer),
    "tuned weight": Variant({"tune_clear_weight": True}),
    "rank 8": Variant({"lora_r": 8, "lora_alpha": 16}),
    "rank 2": Variant({"lora_r": 2, "lora_alpha": 4}),
}
