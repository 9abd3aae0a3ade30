"""Random CLIP and DINO towers of a few thousand weights, saved as the real ones are."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

SIZE = 32
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path, seed: int = 0) -> str:
    """A CLIP that reads letters, 16 tokens at most."""
    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    text = _TOWER | {"vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = _TOWER | {"image_size": SIZE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return str(folder)


def save_dino(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    ViTModel(ViTConfig(**_TOWER, image_size=SIZE, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return str(folder)
