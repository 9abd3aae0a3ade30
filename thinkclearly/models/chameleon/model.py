"""Chameleon, Anole and TwGI as a `TokenModel`: plain functions over transformers' ChameleonForConditionalGeneration.

Knows nothing of CLEAR, and nothing of files.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import ChameleonForConditionalGeneration

from thinkclearly.models.chameleon.processor import RESCALE
from thinkclearly.models.chameleon.vocabulary import image_ids
from thinkclearly.models.exact import full_precision, hash_of
from thinkclearly.models.protocol import PromptBatch, fill_pictures


class Chameleon:
    """See `models.protocol.TokenModel`. Words and codes share one vocabulary and one head.

    A picture is read as its codes: there is no understanding tower, and `see` embeds them.

    Args:
        network: native model whose `model.vqmodel` has got a `decoder`, with LoRA layers inside or without.

    Attributes:
        code_ids: long (K,), the token id of each code.
    """

    learning_parts = ("layers", "norm", "embed_tokens", "lm_head")
    tokenizer_part = tower_part = "vqmodel"

    def __init__(self, network: ChameleonForConditionalGeneration):
        self.network = network
        self.code_ids = torch.tensor(image_ids(network.config.vocabulary_map, f"{network.name_or_path}/config.json"))
        self._moved: dict[torch.device, torch.Tensor] = {}

    @property
    def language_model(self):
        return self.network.model

    @property
    def codebook_size(self) -> int:
        return self.network.config.vq_config.num_embeddings

    @property
    def feature_size(self) -> int:
        """D, the length of a row of the codebook."""
        return self.network.config.vq_config.embed_dim

    @property
    def hidden_size(self) -> int:
        return self.network.config.hidden_size

    @property
    def grid(self) -> int:
        vq = self.network.config.vq_config
        return vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)

    @property
    def image_size(self) -> int:
        return self.network.config.vq_config.resolution

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        vq = self.network.model.vqmodel
        with full_precision(vq.device):
            codes = vq.encode(pixels.to(vq.device, torch.float32)).image_tokens.view(pixels.shape[0], -1)
        return codes.to(pixels.device)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """As the protocol says, so white is 1, where the model's own scale ends at 255 · 0.0078 - 1 = 0.989."""
        vq = self.network.model.vqmodel
        with full_precision(vq.device):
            rows = vq.quantize.embedding(codes.to(vq.device)).view(len(codes), self.grid, self.grid, -1)
            pixels = vq.decoder(vq.post_quant_conv(rows.permute(0, 3, 1, 2)))
        return ((pixels + 1) / (127.5 * RESCALE) - 1).to(codes.device)

    @torch.no_grad()
    def codebook_features(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes, long (...), to their rows of the codebook, float32 (..., D)."""
        table = self.network.model.vqmodel.quantize.embedding
        return table(codes.to(table.weight.device)).float().to(codes.device)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.embed_codes(self.encode(pixels))

    def embed_prompt(
        self, prompt: PromptBatch, features: torch.Tensor | None = None, codes: torch.Tensor | None = None
    ) -> torch.Tensor:
        pictures = features if codes is None else self.embed_codes(codes)
        slots = torch.maximum(prompt.seen_slots, prompt.known_slots)  # a picture is laid out once
        return fill_pictures(self.embed_words(prompt.input_ids), replace(prompt, known_slots=slots), None, pictures)

    def embed_words(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network.get_input_embeddings()(ids).to(ids.device)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        return self.embed_words(self._ids_on(codes.device)[codes])

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        # The whole head and not its rows, so that LoRA and quantized weights work.
        logits = self.network.lm_head(hidden)
        return logits.index_select(-1, self._ids_on(logits.device)).float()

    def word_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the whole vocabulary, pictures' codes included: (..., V)."""
        return self.network.lm_head(hidden).float()

    def parts(self) -> dict[str, nn.Module]:
        return {**dict(self.network.model.named_children()), "lm_head": self.network.lm_head}

    def codebook_fingerprint(self) -> str:
        """Of the codebook and the encoder's last weights, rounded to float16."""
        vq = self.network.model.vqmodel
        tensors = vq.quantize.embedding.weight, vq.quant_conv.weight
        return hash_of(tensor.detach().to("cpu", torch.float16) for tensor in tensors)

    def base_fingerprint(self) -> str:
        """Of every 64th row of the head and of the embeddings, and of the norms, rounded to bfloat16.

        The same for float32 and bfloat16, for layers in 4 or 8 bits, and wherever accelerate keeps the weights; ""
        in float16, whose rounding is another.
        """
        core = self.network.model
        sampled = [getattr(self.network.lm_head, "base_layer", self.network.lm_head), core.embed_tokens]
        modules = sampled + [core.norm, *(m for name, m in core.layers.named_modules() if name.endswith("norm"))]
        if any(module.weight.dtype not in (torch.float32, torch.bfloat16) for module in modules):
            return ""
        tensors = []
        for module in modules:
            with align_module_device(module):
                rows = module.weight[::64] if module in sampled else module.weight
                tensors.append(rows.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16))
        return hash_of(tensors)

    def _ids_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._moved:
            # What is first asked for by a decoder has to serve training too: GRPO draws, then learns.
            with torch.inference_mode(False):
                self._moved[device] = self.code_ids.to(device)
        return self._moved[device]
