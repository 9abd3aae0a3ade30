"""The decoder of Chameleon's image tokenizer, which transformers leaves out.

Modules carry the names of the checkpoints that have one (Anole, TwGI). Knows nothing of files.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)
from transformers.models.janus.modeling_janus import JanusVQVAEConvUpsample


class VQDecoder(nn.Module):
    """Latents (B, latent_channels, G, G) to pictures (B, 3, S, S), as the encoder takes them.

    Unlike Janus', it has attention in the middle only (unless `attn_resolutions` says otherwise), and keeps its levels
    by falling resolution. Source: `ChameleonVQVAEDecoder` in
    [modeling_chameleon.py](https://github.com/GAIR-NLP/thinking-with-generated-images) of the original's transformers.
    """

    def __init__(self, config: ChameleonVQVAEConfig):
        super().__init__()
        multipliers = config.channel_multiplier
        channels = config.base_channels * multipliers[-1]
        resolution = config.resolution // 2 ** (len(multipliers) - 1)
        attends = config.attn_type == "vanilla"
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1 = ChameleonVQVAEEncoderResnetBlock(config, channels, channels)
        self.mid.attn_1 = ChameleonVQVAEEncoderAttnBlock(channels) if attends else nn.Identity()
        self.mid.block_2 = ChameleonVQVAEEncoderResnetBlock(config, channels, channels)
        levels = []
        for i, multiplier in reversed(list(enumerate(multipliers))):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                width = config.base_channels * multiplier
                level.block.append(ChameleonVQVAEEncoderResnetBlock(config, channels, width))
                channels = width
                if attends and resolution in (config.attn_resolutions or ()):
                    level.attn.append(ChameleonVQVAEEncoderAttnBlock(channels))
            if i > 0:
                level.upsample = JanusVQVAEConvUpsample(channels)
                resolution *= 2
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, getattr(config, "out_channels", 3), 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(latents)
        hidden = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hidden)))
        for level in reversed(self.up):
            for i, block in enumerate(level.block):
                hidden = block(hidden)
                if len(level.attn):
                    hidden = level.attn[i](hidden)
            if hasattr(level, "upsample"):
                hidden = level.upsample(hidden)
        return self.conv_out(nn.functional.silu(self.norm_out(hidden)))
