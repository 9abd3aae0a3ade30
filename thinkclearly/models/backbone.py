"""What the editor asks of a Janus model: pictures to tokens and back, features, and embedded prompts.

Plain functions over transformers' JanusForConditionalGeneration (with or without LoRA inside). Knows nothing of CLEAR.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from transformers import JanusForConditionalGeneration

from thinkclearly.models.checkpoint import load_janus
from thinkclearly.models.prompt import ClearEditProcessor, PromptBatch

_PRECISION = threading.RLock()  # what it guards belongs to the process
TINY = Path(__file__).parents[1] / "tiny_janus"


@dataclass
class Backbone:
    """A Janus model and the processor that belongs to it."""

    model: JanusForConditionalGeneration
    processor: ClearEditProcessor


def load_backbone(name_or_path: str, *, revision: str | None = None, token: str | None = None, **kwargs) -> Backbone:
    """Loads a native or DeepSeek-format Janus checkpoint with its processor.

    Args:
        name_or_path: folder or Hub id; "tiny" is the model that ships with this package.
        kwargs: `dtype`, `device`, `attn_implementation`, `device_map`, `quantization_config`; see `load_janus`.

    Raises:
        FileNotFoundError, ValueError: as `load_janus`, or the processor is for pictures of another size.
    """
    path = str(TINY) if name_or_path == "tiny" else str(name_or_path)
    processor = ClearEditProcessor.from_pretrained(path, revision=revision, token=token)
    model = load_janus(path, revision=revision, token=token, **kwargs)
    vision = model.config.vision_config
    expected = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    found = processor.image_size, processor.num_image_tokens
    if found != expected:
        raise ValueError(
            f"{path}: preprocessor_config.json and processor_config.json say {found[0]} pixels and {found[1]} tokens "
            f"a picture, the model has {expected[0]} and {expected[1]}. Get the files that belong together."
        )
    return Backbone(model.eval(), processor)


@contextmanager
def _full_precision(device: torch.device):
    """The VQ model runs in float32 whatever the rest does: an argmin over codes depends on the dtype.

    TF32, which CUDA takes for float32 unless told otherwise, is off meanwhile.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with _PRECISION:
            kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
            before = [kind.fp32_precision for kind in kinds]
            try:
                for kind in kinds:
                    kind.fp32_precision = "ieee"
                yield
            finally:
                for kind, precision in zip(kinds, before):
                    kind.fp32_precision = precision


@torch.no_grad()
def encode_tokens(janus: JanusForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Codes of pictures: float (B, 3, S, S) in [-1, 1] to long (B, N), row by row of the grid."""
    vq = janus.model.vqmodel
    with _full_precision(vq.device):
        tokens = vq.encode(pixel_values.float()).image_tokens.view(pixel_values.shape[0], -1)
    return tokens.to(pixel_values.device)


@torch.no_grad()
def decode_tokens(janus: JanusForConditionalGeneration, tokens: torch.Tensor) -> torch.Tensor:
    """Pictures of codes: long (B, N) to float32 (B, 3, S, S), about [-1, 1], not clipped."""
    vq = janus.model.vqmodel
    with _full_precision(vq.device):
        return vq.decode(tokens).float().to(tokens.device)


def tower_features(janus: JanusForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """SigLIP features before the aligner: (B, 3, S, S) to (B, N, W), W the tower's own width."""
    vision = janus.model.vision_model
    return vision(pixel_values.to(vision.embeddings.patch_embedding.weight.dtype)).last_hidden_state


def image_features(janus: JanusForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """SigLIP features behind the aligner: (B, 3, S, S) to (B, N, H)."""
    return janus.model.aligner(tower_features(janus, pixel_values))


def token_embeddings(janus: JanusForConditionalGeneration, tokens: torch.Tensor) -> torch.Tensor:
    """Codes (B, n) as the language model reads them: (B, n, H)."""
    return janus.prepare_embeddings_for_image_generation(tokens)


def embed_prompt(
    janus: JanusForConditionalGeneration,
    prompt: PromptBatch,
    features: torch.Tensor | None = None,
    source_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embedded prompt (B, L, H) with the slots filled: features (B, N, H) and the codes of source_tokens (B, N).

    It is where the prompt's ids are, wherever the parts of the model lie.
    """
    embeds = janus.get_input_embeddings()(prompt.input_ids).to(prompt.input_ids.device)
    if features is not None:
        embeds = _fill(embeds, prompt.image_slot, features)
    if source_tokens is not None:
        embeds = _fill(embeds, prompt.source_slot, token_embeddings(janus, source_tokens))
    return embeds


def _fill(embeds: torch.Tensor, slot: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Writes values (B, N, H) into embeds (B, L, H) from each row's slot on; rows with slot -1 stay as they are."""
    n = values.shape[1]
    offset = torch.arange(embeds.shape[1], device=embeds.device) - slot[:, None]
    inside = (slot[:, None] >= 0) & (offset >= 0) & (offset < n)
    index = offset.clamp(0, n - 1).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return torch.where(inside.unsqueeze(-1), values.to(embeds).gather(1, index), embeds)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, L) that start at 0 on each row's first real token, so left padding changes nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def codebook_hash(janus: JanusForConditionalGeneration) -> str:
    """Names the codebook: SHA-256 of its unit rows and of the encoder's last weights, rounded to float16."""
    vq = janus.model.vqmodel
    digest = hashlib.sha256()
    for tensor in (F.normalize(vq.quantize.embedding.weight.detach().float(), dim=-1), vq.quant_conv.weight.detach()):
        digest.update(tensor.to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_hash(janus: JanusForConditionalGeneration) -> str:
    """Names the base model: SHA-256 of its generation head, language norms and every 64th word, rounded to bfloat16.

    Fine-tunes of one model share codebook and shapes but not these. The same for float32 and bfloat16, and for a
    language model in 4 or 8 bits, and wherever accelerate keeps the weights; "" in float16, whose rounding is another,
    and where the head itself is quantised.
    """
    core = janus.model
    heads = [core.generation_head.proj_out, core.generation_head.vision_head]
    modules = [getattr(module, "base_layer", module) for module in heads]  # without LoRA
    modules += [core.language_model.embed_tokens, core.language_model.norm]
    modules += [layer.input_layernorm for layer in core.language_model.layers]
    if any(module.weight.dtype not in (torch.float32, torch.bfloat16) for module in modules):
        return ""
    digest = hashlib.sha256()
    for module in modules:
        with align_module_device(module):
            rows = module.weight[::64] if module is core.language_model.embed_tokens else module.weight
            bits = rows.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]


def teacher_forced_hidden(
    janus: JanusForConditionalGeneration, embeds: torch.Tensor, attention_mask: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Hidden states that predict all N output positions, the first from the prompt's BOI: (B, N, H).

    Args:
        embeds: (B, L, H), an embedded prompt.
        attention_mask: long (B, L).
        tokens: long (B, N), codes of the output as inference would feed them back.
    """
    n = tokens.shape[1]
    embeds = torch.cat([embeds, token_embeddings(janus, tokens[:, :-1]).to(embeds)], dim=1)
    mask = torch.cat([attention_mask, attention_mask.new_ones(tokens.shape[0], n - 1)], dim=1)
    output = janus.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions(mask), use_cache=False
    )
    return output.last_hidden_state[:, -n:].to(embeds.device)
