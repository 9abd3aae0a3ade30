"""The first half of the tiny Janus: its VQ model, on pictures before and after an edit.

An autoencoder on unit-length latents first, then k-means for the codebook, then quantized.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from data import GRID, batches, held_out
from sklearn.cluster import MiniBatchKMeans
from tqdm import tqdm
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

CODES = 1024
SEED, PAIRS, STEPS, LEARNING_RATE, WARMUP = 1, 8, 3200, 1e-3, 50
AUTOENCODER_STEPS = 1400


def rate(step: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * cosine)


def vq_config(hidden: int) -> JanusVQVAEConfig:
    # 64 channels at least: with the 32 groups that are hard-wired, fewer make GroupNorm an instance norm.
    return JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODES,
        latent_channels=128,
        base_channels=64,
        channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=0,
        num_patches=GRID,
        projection_dim=hidden,
        image_token_embed_dim=hidden,
    )


def initialise(vq: JanusVQVAE) -> None:
    """PyTorch's own initialisation, and blocks that begin as the identity: both learn faster than the 0.02 normal."""
    for name, module in vq.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
            if name.endswith(("conv2", "proj_out")):
                torch.nn.init.zeros_(module.weight)


def latents(vq: JanusVQVAE, pixels: torch.Tensor) -> torch.Tensor:
    return F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)


def quantize(vq: JanusVQVAE, z: torch.Tensor) -> torch.Tensor:
    codebook = F.normalize(vq.quantize.embedding.weight, dim=-1)
    ids = (z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1]) @ codebook.detach().T).argmax(-1)
    return codebook[ids].view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)


def train_vq(directory: Path, hidden: int) -> None:
    torch.manual_seed(0)
    vq = JanusVQVAE(vq_config(hidden))
    initialise(vq)
    vq = vq.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    data, test = batches(SEED, PAIRS, square=True), held_out(64).pixels[:, 0]
    for step in (bar := tqdm(range(STEPS), desc="vq")):
        if step == AUTOENCODER_STEPS:
            fit_codebook(vq, data)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        x = next(data).pixels.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        z, codebook_loss = latents(vq, x), 0.0
        if step >= AUTOENCODER_STEPS:
            q = quantize(vq, z)
            codebook_loss = ((q - z.detach()) ** 2).sum(1).mean() + 0.25 * ((q.detach() - z) ** 2).sum(1).mean()
            z = z + (q - z).detach()
        y = vq.decoder(vq.post_quant_conv(z))
        optimizer.zero_grad()
        (F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x) + 0.1 * codebook_loss).backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == STEPS:
            bar.write(f"step {step + 1}: held-out reconstruction {psnr(vq, test, step >= AUTOENCODER_STEPS):.2f} dB")
            state = {name: tensor.contiguous() for name, tensor in vq.state_dict().items()}
            state["quantize.embedding.weight"] = F.normalize(state["quantize.embedding.weight"], dim=-1)
            torch.save(state, directory / "vq.pt")


@torch.no_grad()
def fit_codebook(vq: JanusVQVAE, data) -> None:
    z = [latents(vq, next(data).pixels.flatten(0, 1)).permute(0, 2, 3, 1).reshape(-1, 8) for _ in range(60)]
    kmeans = MiniBatchKMeans(CODES, batch_size=8192, n_init=1, random_state=0, max_iter=60).fit(torch.cat(z).numpy())
    vq.quantize.embedding.weight.copy_(F.normalize(torch.from_numpy(kmeans.cluster_centers_).float(), dim=-1))


@torch.no_grad()
def psnr(vq: JanusVQVAE, pixels: torch.Tensor, quantized: bool) -> float:
    z = latents(vq, pixels)
    y = vq.decoder(vq.post_quant_conv(quantize(vq, z) if quantized else z)).clamp(-1, 1)
    return (10 * torch.log10(4 / ((y - pixels) ** 2).mean((1, 2, 3)))).mean().item()
