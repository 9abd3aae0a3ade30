"""Janus, Janus-Pro and Janus-4o as a `TokenModel`: plain functions over transformers' JanusForConditionalGeneration.

Knows nothing of CLEAR, and nothing of files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn
from transformers import JanusForConditionalGeneration

from thinkclearly.models.exact import full_precision, hash_of
from thinkclearly.models.protocol import PromptBatch, fill_pictures


class Janus:
    """See `models.protocol.TokenModel`.

    Args:
        network: native model, with LoRA layers inside or without.
    """

    learning_parts = ("language_model", "generation_head")
    tokenizer_part, tower_part = "vqmodel", "vision_model"

    def __init__(self, network: JanusForConditionalGeneration):
        self.network = network

    @property
    def language_model(self):
        return self.network.model.language_model

    @property
    def codebook_size(self) -> int:
        return self.network.config.vq_config.num_embeddings

    @property
    def hidden_size(self) -> int:
        return self.network.config.text_config.hidden_size

    @property
    def grid(self) -> int:
        vision = self.network.config.vision_config
        return vision.image_size // vision.patch_size

    @property
    def image_size(self) -> int:
        return self.network.config.vision_config.image_size

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        vq = self.network.model.vqmodel
        with full_precision(vq.device):
            codes = vq.encode(pixels.to(vq.device, torch.float32)).image_tokens.view(pixels.shape[0], -1)
        return codes.to(pixels.device)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        vq = self.network.model.vqmodel
        with full_precision(vq.device):
            return vq.decode(codes.to(vq.device)).float().to(codes.device)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        vision = self.network.model.vision_model
        weight = vision.embeddings.patch_embedding.weight
        return vision(pixels.to(weight.device, weight.dtype)).last_hidden_state

    def embed_prompt(
        self, prompt: PromptBatch, features: torch.Tensor | None = None, codes: torch.Tensor | None = None
    ) -> torch.Tensor:
        seen = None if features is None else self.network.model.aligner(features)
        known = None if codes is None else self.embed_codes(codes)
        return fill_pictures(self.embed_words(prompt.input_ids), prompt, seen, known)

    def embed_words(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network.get_input_embeddings()(ids).to(ids.device)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        return self.network.prepare_embeddings_for_image_generation(codes)

    def code_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.network.model.generation_head(hidden).float()

    def word_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.network.lm_head(hidden).float()

    def parts(self) -> dict[str, nn.Module]:
        return {**dict(self.network.model.named_children()), "lm_head": self.network.lm_head}

    def codebook_fingerprint(self) -> str:
        """SHA-256 of the codebook's unit rows and of the encoder's last weights, rounded to float16."""
        vq = self.network.model.vqmodel
        tensors = F.normalize(vq.quantize.embedding.weight.detach().float(), dim=-1), vq.quant_conv.weight.detach()
        return hash_of(tensor.to("cpu", torch.float16) for tensor in tensors)

    def base_fingerprint(self) -> str:
        """SHA-256 of the generation head, language norms and every 64th word, rounded to bfloat16.

        Fine-tunes of one model share codebook and shapes but not these. The same for float32 and bfloat16, for a
        language model in 4 or 8 bits, and wherever accelerate keeps the weights; "" in float16, whose rounding is
        another, and where the head itself is quantised.
        """
        core = self.network.model
        heads = [core.generation_head.proj_out, core.generation_head.vision_head]
        modules = [getattr(module, "base_layer", module) for module in heads]  # without LoRA
        modules += [core.language_model.embed_tokens, core.language_model.norm]
        modules += [layer.input_layernorm for layer in core.language_model.layers]
        if any(module.weight.dtype not in (torch.float32, torch.bfloat16) for module in modules):
            return ""
        tensors = []
        for module in modules:
            with align_module_device(module):
                rows = module.weight[::64] if module is core.language_model.embed_tokens else module.weight
                tensors.append(rows.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16))
        return hash_of(tensors)
