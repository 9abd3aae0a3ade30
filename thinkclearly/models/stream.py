"""StreamModel: an `InstructionModel` that is scored over whole streams of words and pictures.

Words and pictures by cross-entropy over one vocabulary, edited pictures over the K + I classes of the image head where
there are instruction tokens, and all pictures by how well a projection of hidden states meets the codebook's rows.
Source: GAIR-NLP/thinking-with-generated-images, finetune.py, whose projection is random and never trained; here it is
one of the weights. Knows nothing of data files or optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from thinkclearly.files import replacing_in
from thinkclearly.models.cross_entropy import Scores, score_hidden, score_words
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.protocol import position_ids
from thinkclearly.models.weight_files import read_tensors

PROJECTION_FILE = "reconstruction.safetensors"
PLACES = ("next", "own")


@dataclass
class StreamScores(ModelOutput):
    """Teacher-forced scores of a batch of streams.

    Attributes:
        nll: float32 (A,), negative log-likelihood of each labelled id, in nats.
        word: long (A,), the likeliest id.
        edits: scores (E, N) of edited pictures over K + I classes.
        squared_error: float32 (P,), of each picture the sum of (projected hidden state - row of the codebook)² over
            N · D elements.
    """

    nll: torch.Tensor | None = None
    word: torch.Tensor | None = None
    edits: Scores | None = None
    squared_error: torch.Tensor | None = None


class StreamModel(InstructionModel):
    """Adds the projection H → D, with bias, that the reconstruction is scored by. Decoding has no use for it.

    Args:
        network, config: as for `InstructionModel`; a Chameleon, whose words and codes share one head.
        reconstruction_at: `"next"` projects the hidden state that predicts a code, `"own"`, as the original does, the
            one that has just read it.
    """

    def __init__(self, network: PreTrainedModel | PeftModel, config: ClearConfig, reconstruction_at: str = "next"):
        super().__init__(network, config)
        if reconstruction_at not in PLACES:
            raise ValueError(f"reconstruction_at={reconstruction_at!r}; choose from {', '.join(PLACES)}")
        self.shift = int(reconstruction_at == "next")
        # float32 whatever the base runs in, as the CLEAR head.
        self.projection = nn.Linear(self.token_model.hidden_size, self.token_model.feature_size)

    @classmethod
    def of(cls, model: InstructionModel, reconstruction_at: str = "next") -> StreamModel:
        """A model that is set up to learn, with a fresh projection added."""
        stream = cls(model.network, model.clear_config, reconstruction_at)
        stream.clear_head = model.clear_head
        return stream

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        word_rows: torch.Tensor,
        word_columns: torch.Tensor,
        word_labels: torch.Tensor,
        picture_rows: torch.Tensor,
        picture_columns: torch.Tensor,
        picture_codes: torch.Tensor,
        edit_rows: torch.Tensor,
        edit_columns: torch.Tensor,
        edit_labels: torch.Tensor,
    ) -> StreamScores:
        """Scores of a batch; `data.streams.StreamCollator` says what its tensors are.

        Without edits or pictures their heads still run, on nothing: processes that share gradients must agree on
        which weights have some.
        """
        family, n = self.token_model, picture_codes.shape[1]
        hidden = family.language_model(
            inputs_embeds=family.embed_words(input_ids),
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state.to(input_ids.device)
        nll, word = score_words(family.word_logits, hidden[word_rows, word_columns], word_labels)
        offsets = torch.arange(n, device=input_ids.device)
        before_edits = hidden[edit_rows[:, None], edit_columns[:, None] + offsets - 1]
        edits = score_hidden(self.logits, before_edits, edit_labels, self.vocabulary.codebook_size)
        states = hidden[picture_rows[:, None], picture_columns[:, None] + offsets - self.shift]
        return StreamScores(nll, word, edits, self._squared_error(states, picture_codes))

    def _squared_error(self, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Hidden states (P, N, H) and codes, long (P, N), to float32 (P,)."""
        # FSDP's mixed precision hands the weights over in bfloat16, hence float() on them as well.
        weight, bias = self.projection.weight.float(), self.projection.bias.float()
        with torch.autocast(weight.device.type, enabled=False):
            projected = nn.functional.linear(states.to(weight.device).float(), weight, bias)
        wanted = self.token_model.codebook_features(codes).to(projected)
        return (projected - wanted).square().sum((1, 2))

    def save_pretrained(self, directory: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes what `InstructionModel` does, and the projection, which only training reads back."""
        state = self.state_dict() if state_dict is None else state_dict
        tensors = {
            name: state[f"projection.{name}"].detach().float().cpu().contiguous() for name in ("weight", "bias")
        }
        with replacing_in(directory) as folder:
            super().save_pretrained(folder, state_dict=state)
            save_file(tensors, folder / PROJECTION_FILE, metadata={"format": "pt"})

    def load_head(self, directory: str | Path) -> None:
        """Reads the CLEAR head and the projection; a missing file or another shape is an error."""
        super().load_head(directory)
        path = Path(directory) / PROJECTION_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no {PROJECTION_FILE}: no run of method interleaved wrote it.")
        tensors = read_tensors(path)
        found, expected = ({k: tuple(v.shape) for k, v in t.items()} for t in (tensors, self.projection.state_dict()))
        if found != expected:
            raise ValueError(f"{path} has tensors {found}; this model's projection has {expected}.")
        self.projection.load_state_dict(tensors)
