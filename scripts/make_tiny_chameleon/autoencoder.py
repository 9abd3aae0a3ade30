"""The first half of the tiny Chameleon: its VQ model, which knows nothing of a picture but its patches one by one.

The encoder is not trained but set: it takes the principal components of a patch's pixels, exactly, through
convolutions that have more to offer. So a patch that does not change keeps its code, whatever happens beside it. Then
k-means for the codebook, and only the decoder learns; it does look at a patch's surroundings.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import GRID, IMAGE_SIZE, PATCH, wanted_pictures
from parallel import backward
from sklearn.cluster import MiniBatchKMeans
from torch import nn
from tqdm import tqdm
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

from thinkclearly.models.chameleon.decoder import VQDecoder
from thinkclearly.models.chameleon.processor import RESCALE

CODES, COMPONENTS = 512, 24
PLAIN = 200  # how often each patch of one colour counts in k-means; three in four patches are such
SEED, POOL, STEPS, LEARNING_RATE, WARMUP = 11, 4000, 2000, 2e-3, 30
EDGE = 5.0  # weight of patches of more than one colour
PARTS, PART = 4, 2  # of a batch, and pictures of each
OFFSET, MIDDLE = 64.0, 16.0  # see `set_encoder`


def vq_config() -> ChameleonVQVAEConfig:
    # GroupNorm has 32 groups: the last norms need more than one channel in each, the encoder's needs four.
    return ChameleonVQVAEConfig(
        embed_dim=COMPONENTS,
        num_embeddings=CODES,
        latent_channels=COMPONENTS,
        resolution=IMAGE_SIZE,
        base_channels=32,
        channel_multiplier=[2, 1, 2, 4],
        num_res_blocks=1,
        attn_type="none",
    )


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, S, S, 3) to what the processor makes of them, float32 (B, 3, S, S)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() * RESCALE - 1


def cells(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Pixels (B, 3, S, S) to patches of `side` pixels, float (cells, side² · 3), pixels by rows, colours last."""
    return F.unfold(pixels, side, stride=side).unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)


def components(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (n,) and the first principal components (count, n) of rows (m, n)."""
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    return mean, vectors.flip(-1).T[:count]


@torch.no_grad()
def fit_codes(vq: ChameleonVQVAE, pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets the encoder and the codebook; returns mean and scaled components of a patch, which the codes stand for."""
    pixels = to_pixels(pictures)
    patches = cells(pixels, PATCH)
    plain = patches.unflatten(1, (-1, 3)).std(1).amax(1) < 1e-3
    patches = torch.cat([patches[~plain], patches[plain].unique(dim=0).repeat(PLAIN, 1)])
    mean, directions = components(patches, COMPONENTS)
    scale = ((patches - mean) @ directions.T).square().mean().sqrt()
    quarter = cells(pixels[:500], PATCH // 2)
    set_encoder(vq.encoder, components(quarter.unique(dim=0), 32), (mean, directions / scale))
    for conv in (vq.quant_conv, vq.post_quant_conv):
        conv.weight.copy_(torch.eye(COMPONENTS)[..., None, None])
        conv.bias.zero_()
    rows = ((patches - mean) @ directions.T / scale).numpy()
    kmeans = MiniBatchKMeans(CODES, batch_size=8192, n_init=1, random_state=0, max_iter=100).fit(rows)
    vq.quantize.embedding.weight.copy_(torch.from_numpy(kmeans.cluster_centers_))
    return mean, directions / scale


def set_encoder(encoder: nn.Module, quarters: tuple, patches: tuple) -> None:
    """Makes the encoder compute the components of patches.

    Strided convolutions gather 2 by 2, then 4 by 4 pixels, whose 32 components stand for their 48 numbers, then a
    patch, whose components f go on. The residual blocks add nothing. The group norm before the end would make f depend
    on the rest of the picture: each f therefore comes as C + f, C - f, f - C and -C - f in a group of its own, whose
    mean is 0 and whose variance is C² and a little. What follows brings them to where SiLU is the identity.

    Args:
        quarters: mean and components of a quarter of a patch. patches: of a patch.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
            module.bias.zero_()
    down, taps = encoder.down, [(y, x) for y in range(2) for x in range(2)]
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    down[0].block[0].nin_shortcut.weight[:3, :3, 0, 0] = torch.eye(3)
    for i, (y, x) in enumerate(taps):
        down[0].downsample.conv.weight[3 * i : 3 * i + 3, :3, y, x] = torch.eye(3)
    down[1].block[0].nin_shortcut.weight[:12, :12, 0, 0] = torch.eye(12)
    (mean4, directions4), (mean8, directions8) = quarters, patches
    order = torch.arange(48).view(2, 2, 2, 2, 3).permute(0, 2, 1, 3, 4).reshape(4, 12)  # pixels by the two strides
    for i, (y, x) in enumerate(taps):
        down[1].downsample.conv.weight[:, :12, y, x] = directions4[:, order[i]]
    down[1].downsample.conv.bias.copy_(-directions4 @ mean4)
    down[2].block[0].nin_shortcut.weight[:32, :32, 0, 0] = torch.eye(32)
    places = torch.arange(192).view(2, 4, 2, 4, 3).permute(0, 2, 1, 3, 4).reshape(4, 48)
    for i, (y, x) in enumerate(taps):
        down[2].downsample.conv.weight[:COMPONENTS, :32, y, x] = directions8[:, places[i]] @ directions4.T
    zero = torch.empty_like(mean8)  # the patch whose quarters' components are all 0
    zero[places.flatten()] = mean4.repeat(4)
    down[2].downsample.conv.bias[:COMPONENTS] = directions8 @ (zero - mean8)
    shortcut, out, norm = down[3].block[0].nin_shortcut, encoder.conv_out, encoder.norm_out
    norm.weight.fill_(OFFSET)
    for i in range(COMPONENTS):
        for j, (offset, sign) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1))):
            shortcut.weight[4 * i + j, i, 0, 0] = sign
            shortcut.bias[4 * i + j] = offset * OFFSET
            norm.bias[4 * i + j] = MIDDLE - offset * OFFSET
            out.weight[i, 4 * i + j, 1, 1] = sign / 4


@torch.no_grad()
def initialise(decoder: VQDecoder) -> None:
    """PyTorch's own initialisation, and blocks that begin as the identity: both learn faster than the 0.02 normal."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
            if name.endswith("conv2"):
                module.weight.zero_()
                module.bias.zero_()


def decoded(vq: ChameleonVQVAE, codes: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, S, S), without the blocks at full resolution: they cost most and stay the identity."""
    rows = vq.quantize.embedding(codes).unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
    decoder = vq.decoder
    hidden = decoder.conv_in(vq.post_quant_conv(rows).contiguous(memory_format=torch.channels_last))
    hidden = decoder.mid.block_2(decoder.mid.block_1(hidden))
    for level in reversed(decoder.up[1:]):
        for block in level.block:
            hidden = block(hidden)
        hidden = level.upsample(hidden)
    return decoder.conv_out(F.silu(decoder.norm_out(decoder.up[0].block[0].nin_shortcut(hidden))))


def codes_of(pictures: np.ndarray, projection: tuple, codebook: torch.Tensor) -> torch.Tensor:
    """Codes, long (B, N), as the network's encoder finds them, in a hundredth of the time.

    Args:
        pictures: uint8 (B, S, S, 3).
        projection: mean and scaled components of a patch, as `fit_codes` returns them.
    """
    mean, directions = projection
    parts = torch.from_numpy(pictures).split(500)
    found = [
        torch.cdist((cells(to_pixels(p.numpy()), PATCH) - mean) @ directions.T, codebook).argmin(1) for p in parts
    ]
    return torch.cat(found).view(len(pictures), -1)


def near_edges(pictures: np.ndarray) -> torch.Tensor:
    """Weights of pixels, float (B, 1, S, S): `EDGE` for patches of more than one colour else 1."""
    patches = torch.from_numpy(pictures).unflatten(1, (GRID, PATCH)).unflatten(3, (GRID, PATCH))
    edge = (patches.amax((2, 4)) != patches.amin((2, 4))).any(-1)[:, None].float()
    return 1 + (EDGE - 1) * F.interpolate(edge, scale_factor=PATCH)


def rate(step: int) -> float:
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / STEPS)))


def train_vq(directory: Path) -> None:
    torch.manual_seed(0)
    vq = ChameleonVQVAE(vq_config())
    vq.decoder = VQDecoder(vq.config)
    initialise(vq.decoder)
    pictures, test = wanted_pictures(SEED, POOL), wanted_pictures(SEED, 64, "test")
    projection = fit_codes(vq, pictures)
    codebook = vq.quantize.embedding.weight.detach().clone()
    torch.save((*projection, codebook), directory / "codes.pt")
    vq.requires_grad_(False).decoder.requires_grad_(True).to(memory_format=torch.channels_last)
    weights = near_edges(pictures)
    codes, known = codes_of(pictures, projection, codebook), codes_of(test, projection, codebook)
    parameters = list(vq.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)

    def loss(rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, y = to_pixels(pictures[rows.numpy()]), decoded(vq, codes[rows])
        difference = y - x
        return ((difference.square() + 0.1 * difference.abs()) * weights[rows]).mean() / PARTS, None

    for step in (bar := tqdm(range(STEPS), desc="decoder", mininterval=10)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        backward(loss, torch.randint(POOL, (PARTS, PART)), parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == STEPS:
            with torch.no_grad():
                error = (decoded(vq, known).clamp(-1, 1) - to_pixels(test)).square().mean((1, 2, 3))
            bar.write(f"step {step + 1}: held-out reconstruction {(10 * torch.log10(4 / error)).mean():.2f} dB")
            torch.save({name: tensor.contiguous() for name, tensor in vq.state_dict().items()}, directory / "vq.pt")
