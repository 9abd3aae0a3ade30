"""Models with random weights whose acceptance follows a script: which patches change, and how predictable codes are.

For sizes whose trained weights are not at hand: the cost of a pass is real, how many passes it takes is the script's.
Knows nothing of clocks or tables.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from transformers import PreTrainedModel

from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.janus.random import random_janus
from thinkclearly.models.load import token_model
from thinkclearly.models.protocol import Processor

SHARES = (0.05, 0.15, 0.3, 0.6)  # of patches that an edit changes, from a small object to a new background
FAR = 1e4  # log-odds beyond any doubt

# Sizes of language models; 1b and 7b are Janus-Pro's, whose towers are transformers' defaults.
SIZES = {
    "mid": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 1024,
    },
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32},
}
SMALL_TOWERS = (
    {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    {"base_channels": 32, "channel_multiplier": [1] * 5, "num_res_blocks": 0, "latent_channels": 32},
)


class ScriptedModel(InstructionModel):
    """Copies exactly where the script says so, whatever it is asked and in whichever pass; paints without a script.

    Attributes:
        scale: standard deviation of the codes' logits. Near 0 the sampling noise decides alone, which makes codes easy
            to guess; hardest to guess they are at about 4. Far above it the model repeats itself.
    """

    def __init__(self, network: PreTrainedModel, scale: float):
        super().__init__(network, ClearConfig(token_model(network).codebook_size))
        self.scale, self.position_ids = scale, None
        self.script(torch.ones(1, dtype=torch.bool), 0)
        # Every path into the language model, with position ids given or not, rotates by them.
        self.token_model.language_model.rotary_emb.register_forward_pre_hook(self._note, with_kwargs=True)

    def script(self, changed: torch.Tensor, start: int) -> None:
        """Sets which positions are painted: bool (N,), and the position id of the prompt's last token in all rows.

        That token predicts the first output; beyond N the last entry counts.
        """
        self.changed, self.start = changed.to(self.device), start

    def _note(self, module, args, kwargs) -> None:
        self.position_ids = kwargs["position_ids"]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the base class: hidden states (rows, B, H) of the last B positions, or (rows, H) of the last one."""
        logits = super().logits(hidden)
        codes = self.vocabulary.codebook_size
        logits[..., :codes] *= self.scale
        length = hidden.shape[1] if hidden.dim() == 3 else 1
        index = (self.position_ids[:, -length:] - self.start).clamp(0, len(self.changed) - 1)
        gate = torch.where(self.changed[index], -FAR, FAR)
        logits[..., codes] = gate.view(-1, *hidden.shape[1:-1])
        return logits


def changed_patches(share: float, grid: int, blobs: int = 1, seed: int = 0) -> torch.Tensor:
    """`share` of a grid's patches in `blobs` round spots with ragged borders at random places: bool (grid²,)."""
    rng = np.random.default_rng((seed, blobs))
    rows, columns = np.mgrid[:grid, :grid]
    centres = rng.uniform(0.15, 0.85, (blobs, 2)) * grid
    distance = np.min([np.hypot(rows - y, columns - x) for y, x in centres], axis=0)
    rough = gaussian_filter(rng.standard_normal((grid, grid)), 1)
    rank = (distance + 2 * rough / rough.std()).ravel().argsort()
    changed = np.zeros(grid**2, bool)
    changed[rank[: round(share * grid**2)]] = True
    return torch.from_numpy(changed)


def random_model(
    sizes: dict,
    *,
    grid: int = 24,
    codes: int = 16384,
    towers: tuple[dict, dict] = ({}, {}),
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[ScriptedModel, Processor]:
    """A Janus of the given sizes with random weights and pictures of `grid`×`grid` patches of 16 pixels."""
    network, processor = random_janus(sizes, grid, codes, towers, dtype, device, seed)
    model = ScriptedModel(network, scale).to(device).eval().requires_grad_(False)
    return model, processor
