"""CLIP and DINO as measuring instruments: pictures and words in, unit vectors and self-similarities out.

Pictures are prepared as the benchmarks' authors do, whatever a checkpoint's own preprocessor file says. Knows nothing
of benchmarks or of what is compared with what.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, ViTModel

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Clip:
    """CLIP, float32.

    Args:
        name: Hub id or folder of a CLIP model in transformers' layout, with its tokenizer.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.model = CLIPModel.from_pretrained(name, dtype=torch.float32).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        size = self.model.config.vision_config.image_size
        # OpenAI's `clip.load`: short side resized (bicubic), centre cropped, CLIP's mean and deviation.
        self.processor = _processor(size, size)

    @torch.inference_mode()
    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        """RGB pictures of any size → float32 (B, D) on the CPU, of unit length."""
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"].to(self.model.device)
        return normalize(self.model.get_image_features(pixels).pooler_output, dim=-1).cpu()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """Words, cut to the tower's length (77 tokens) → float32 (B, D) on the CPU, of unit length."""
        length = self.model.config.text_config.max_position_embeddings
        rows = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        rows = rows.to(self.model.device)
        features = self.model.get_text_features(rows["input_ids"], rows["attention_mask"])
        return normalize(features.pooler_output, dim=-1).cpu()


class Dino:
    """DINO (v1) as a plain vision transformer, float32.

    Args:
        name: Hub id or folder of a `ViTModel`, e.g. `facebook/dino-vits16`.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.model = ViTModel.from_pretrained(name, dtype=torch.float32, add_pooling_layer=False).eval().to(device)
        self.size = self.model.config.image_size
        # MagicBrush's evaluation/image_eval.py: short side to 256 (bicubic), 224 cropped out of the centre.
        self.processor = _processor(self.size * 256 // 224, self.size, IMAGENET_MEAN, IMAGENET_STD)

    @torch.inference_mode()
    def images(self, pictures: list[Image.Image]) -> torch.Tensor:
        """RGB pictures of any size → the class token after the last norm, float32 (B, D) on the CPU, unit length."""
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"].to(self.model.device)
        return normalize(self.model(pixels).last_hidden_state[:, 0], dim=-1).cpu()

    @torch.inference_mode()
    def structure(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Square RGB pictures of one size → cosine self-similarity of the last layer's keys, float32 (B, T, T), CPU.

        T is 1 + patches. As PnPInversion's `evaluation/matrics_calculator.py` computes it, and with it all published
        structure distances: bilinear without antialiasing, and levels 0 to 255 go into the normalisation meant for 0
        to 1. The usual preprocessing gives other numbers.
        """
        levels = torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in pictures]))
        pixels = interpolate(levels.permute(0, 3, 1, 2), (self.size, self.size), mode="bilinear")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((pixels - mean) / std).to(self.model.device)
        last = self.model.layers[-1]
        entering = self.model(pixels, output_hidden_states=True).hidden_states[-2]
        keys = normalize(last.attention.k_proj(last.layernorm_before(entering)), dim=-1)
        return (keys @ keys.transpose(1, 2)).cpu()


def _processor(short_side: int, crop: int, mean=None, std=None) -> CLIPImageProcessorPil:
    options = {} if mean is None else {"image_mean": mean, "image_std": std}
    return CLIPImageProcessorPil(
        size={"shortest_edge": short_side}, crop_size={"height": crop, "width": crop}, **options
    )
