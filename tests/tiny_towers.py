"""Random CLIP and DINO towers and a detector, of a few thousand weights each, saved as the real ones are."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

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


def save_mask2former(folder: Path, labels: tuple[str, ...], seed: int = 0, favoured: tuple[str, ...] = ()) -> str:
    """A detector of up to three objects a picture, sure of its classes, which are mostly the favoured ones."""
    torch.manual_seed(seed)
    stages = [f"stage{number}" for number in range(1, 5)]
    sizes = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 2 * SIZE}
    widths = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**sizes, out_features=stages),
        **dict.fromkeys(widths, 32),
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=3,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data *= 50
    model.class_predictor.bias.data[[labels.index(label) for label in favoured]] += 15
    model.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 2 * SIZE, "width": 2 * SIZE}).save_pretrained(folder)
    return str(folder)
