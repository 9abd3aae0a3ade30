"""Random InternVL and Qwen2-VL judges of some ten thousand weights, saved as the real ones are.

Their tokens are bytes, control tokens, and yes and no in three spellings.
"""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLConfig
from transformers import Qwen2VLForConditionalGeneration as Qwen2VL
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WORDS = ("yes", "Yes", "YES", "no", "No", "NO")
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 0}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ 'PICTURE' }}{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_qwen2_vl(folder: Path, words: tuple[str, ...] = WORDS) -> str:
    """A judge that sees a picture of any shape in patches of 14 pixels; its tokenizer merges `words` alone."""
    names = {f"{name}_token": f"<|{name}|>" for name in ("vision_start", "vision_end")}
    names |= {f"{name}_token": f"<|{name}_pad|>" for name in ("image", "video")}
    ids = _save_tokenizer(folder, names, "<|vision_start|><|image_pad|><|vision_end|>", words)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config=TEXT | {"vocab_size": len(ids), "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        **{f"{name}_id": ids[token] for name, token in names.items()},
    )
    _random(Qwen2VL(config)).save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 112**2}).save_pretrained(folder)
    return str(folder)


def save_internvl(folder: Path) -> str:
    """A judge that sees a picture in up to four tiles of 32 pixels and a thumbnail, four tokens each."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    ids = _save_tokenizer(folder, names, "<IMG_CONTEXT>\\n", WORDS)
    vision = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(ids)},
        vision_config=vision | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    _random(InternVLForConditionalGeneration(config)).save_pretrained(folder)
    GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4).save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"image_seq_length": 4, "processor_class": "InternVLProcessor"}')
    return str(folder)


def _save_tokenizer(folder: Path, names: dict[str, str], picture: str, words: tuple[str, ...]) -> dict[str, int]:
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values()]
    ids = {token: i for i, token in enumerate([*control, *sorted(ByteLevel.alphabet()), *map("".join, merges)])}
    tokenizer = Qwen2Tokenizer(
        vocab=ids,
        merges=merges,
        extra_special_tokens=names | {"turn_start_token": "<|im_start|>", "turn_end_token": "<|im_end|>"},
        chat_template=TEMPLATE.replace("PICTURE", picture),
    )
    tokenizer.save_pretrained(folder)
    return ids


def _random(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that answers depend on the picture and on the words."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model
