"""Trains the tiny Janus that ships in thinkclearly/tiny_janus, from nothing. docs/tiny_janus.md tells what it reached.

    python scripts/make_tiny_janus.py vq      # autoencoder on unit latents, k-means codebook, quantized
    python scripts/make_tiny_janus.py lm      # edits and text-to-image, until source codes are copied
    python scripts/make_tiny_janus.py edit    # the same with more weight on what an edit changes
    python scripts/make_tiny_janus.py refine  # the same on clean targets, with Muon
    python scripts/make_tiny_janus.py anneal  # the same, learning rate to zero

The result has no CLEAR head: it is a base model in the manner of Janus-4o, which the demo fine-tunes.
"""

import argparse
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.cluster import MiniBatchKMeans
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.modeling_janus import JanusVQVAE

from thinkclearly.data.shapes import packaged_photos, picture_size, random_edit
from thinkclearly.images import Letterbox, patch_difference
from thinkclearly.models.backbone import embed_prompt, encode_tokens, image_features, teacher_forced_hidden
from thinkclearly.models.prompt import (
    BOS,
    EOS,
    FULL,
    IMAGE,
    PAD,
    PART,
    SPECIAL_TOKENS,
    SYSTEM,
    UNCOND,
    ClearEditProcessor,
)

IMAGE_SIZE, PATCH, CODES, HIDDEN, LAYERS = 64, 8, 1024, 256, 5
TOKENS = (IMAGE_SIZE // PATCH) ** 2
logger = logging.getLogger("make_tiny_janus")


@dataclass
class Stage:
    """Steps, of a cosine schedule over `schedule` steps from `lr`; seeds of the data; shares of the rows."""

    seed: int
    batch: int
    steps: int
    schedule: int
    lr: float
    warmup: int
    conditions: tuple[float, float, float] = (1.0, 0.0, 0.0)  # full, part, uncond
    text_share: float = 0.0  # of text-to-image among the rows
    changed_weight: float = 1.0  # of tokens that the edit changes
    clean: bool = False  # targets keep the source's code where no pixel changed
    muon: bool = False  # for the matrices inside the layers; else AdamW for everything

    def rate(self, step: int, floor: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.schedule))
        return self.lr * min(1.0, (step + 1) / self.warmup) * (floor + (1 - floor) * cosine)


AUTOENCODER_STEPS = 1400
STAGES = {
    "vq": Stage(seed=1, batch=8, steps=3200, schedule=3200, lr=1e-3, warmup=50),
    "lm": Stage(4, 32, 1000, 2800, 1.5e-3, 100, conditions=(0.85, 0.10, 0.05), text_share=1 / 8),
    "edit": Stage(6, 32, 500, 1800, 1.2e-3, 60, conditions=(0.75, 0.15, 0.10), text_share=1 / 16, changed_weight=3.0),
    "refine": Stage(7, 24, 750, 1800, 1.5e-3, 40, (0.75, 0.15, 0.10), 1 / 12, 3.0, clean=True, muon=True),
    "anneal": Stage(9, 24, 400, 400, 1.2e-3, 10, (0.85, 0.10, 0.05), 1 / 12, 3.0, clean=True, muon=True),
}


class Edits(Dataset):
    """Random edits: instruction, caption, source and target as uint8 (2, S, S, 3), unchanged patches, bool (N,)."""

    def __init__(self, seed: int, photos: list[str], square: bool = False):
        self.seed, self.photos, self.square = seed, photos, square

    def __len__(self):
        return 10**7

    def __getitem__(self, index):
        edit = random_edit(self.seed, index, self.photos)
        size = (IMAGE_SIZE, IMAGE_SIZE) if self.square else picture_size(self.seed, index, IMAGE_SIZE)
        box = Letterbox(*size, IMAGE_SIZE)
        source, target = (box.fit(picture) for picture in edit.render(*size)[:2])
        unchanged = patch_difference(source, target, IMAGE_SIZE // PATCH).ravel() <= 16
        return edit.instruction, edit.before.caption(), np.stack([source, target]), unchanged


def collate(rows):
    """Instructions, captions, pixels (B, 2, 3, S, S) in [-1, 1], and unchanged patches (B, N)."""
    pixels = torch.from_numpy(np.stack([row[2] for row in rows])).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return [row[0] for row in rows], [row[1] for row in rows], pixels, torch.from_numpy(np.stack([r[3] for r in rows]))


def batches(stage: Stage, square: bool = False):
    data = Edits(stage.seed, packaged_photos("train"), square)
    return iter(DataLoader(data, stage.batch, collate_fn=collate, num_workers=1, prefetch_factor=4))


def held_out():
    return collate([Edits(5, packaged_photos("test"))[i] for i in range(64)])


# --- autoencoder and codebook -------------------------------------------------------------------------------------


def vq_config() -> JanusVQVAEConfig:
    # 64 channels at least: with the 32 groups that are hard-wired, fewer make GroupNorm an instance norm.
    return JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=CODES,
        latent_channels=128,
        base_channels=64,
        channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=0,
        num_patches=IMAGE_SIZE // PATCH,
        projection_dim=HIDDEN,
        image_token_embed_dim=HIDDEN,
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


def train_vq(stage: Stage, directory: Path) -> None:
    torch.manual_seed(0)
    vq = JanusVQVAE(vq_config())
    initialise(vq)
    vq = vq.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    data, test = batches(stage, square=True), held_out()[2][:, 0]
    for step in (bar := tqdm(range(stage.steps), desc="vq")):
        if step == AUTOENCODER_STEPS:
            fit_codebook(vq, data)
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step, floor=0.02)
        x = next(data)[2].flatten(0, 1).contiguous(memory_format=torch.channels_last)
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
        if (step + 1) % 250 == 0 or step + 1 == stage.steps:
            bar.write(f"step {step + 1}: held-out reconstruction {psnr(vq, test, step >= AUTOENCODER_STEPS):.2f} dB")
            state = {name: tensor.contiguous() for name, tensor in vq.state_dict().items()}
            state["quantize.embedding.weight"] = F.normalize(state["quantize.embedding.weight"], dim=-1)
            torch.save(state, directory / "vq.pt")


@torch.no_grad()
def fit_codebook(vq: JanusVQVAE, data) -> None:
    z = [latents(vq, next(data)[2].flatten(0, 1)).permute(0, 2, 3, 1).reshape(-1, 8) for _ in range(60)]
    kmeans = MiniBatchKMeans(CODES, batch_size=8192, n_init=1, random_state=0, max_iter=60).fit(torch.cat(z).numpy())
    vq.quantize.embedding.weight.copy_(F.normalize(torch.from_numpy(kmeans.cluster_centers_).float(), dim=-1))


@torch.no_grad()
def psnr(vq: JanusVQVAE, pixels: torch.Tensor, quantized: bool) -> float:
    z = latents(vq, pixels)
    y = vq.decoder(vq.post_quant_conv(quantize(vq, z) if quantized else z)).clamp(-1, 1)
    return (10 * torch.log10(4 / ((y - pixels) ** 2).mean((1, 2, 3)))).mean().item()


# --- language model -----------------------------------------------------------------------------------------------


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the generator's own words, with DeepSeek's special tokens."""
    photos = packaged_photos("train")
    edits = [random_edit(3, i, photos) for i in range(4000)]
    text = [e.instruction for e in edits] + [e.before.caption() for e in edits] + [SYSTEM, "What is in the picture?"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 512, "special_tokens": list(SPECIAL_TOKENS), "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(show_progress=False, **options))
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in (BOS, EOS, PAD)],
    )


def build_model(vq_state: dict, tokenizer) -> JanusForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=640,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = JanusVisionConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=HIDDEN,
        num_image_tokens=TOKENS,
    )
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config=text,
            vision_config=vision,
            vq_config=vq_config(),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            tie_word_embeddings=False,
        )
    )
    model.model.vqmodel.load_state_dict(vq_state)
    model.model.vqmodel.requires_grad_(False)
    # The input table starts as the codebook, so that alike patches begin alike; it is a table of its own from then on.
    with torch.no_grad():
        model.model.generation_embeddings.weight.copy_(vq_state["quantize.embedding.weight"])
    return model


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz in float32 (Jordan et al. 2024, Muon), for matrices.

    torch.optim.Muon does the same in bfloat16 one matrix at a time, which a CPU is slow at; here all matrices of one
    shape go through one batched product.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, members in shapes.items():
                updates = []
                for p in members:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                update = orthogonal(torch.stack(updates))
                for p, u in zip(members, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U·Vᵀ of each matrix's singular value decomposition; (B, rows, columns)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def token_loss(model, embeds, prompt, target) -> torch.Tensor:
    logits = model.model.generation_head(teacher_forced_hidden(model, embeds, prompt.attention_mask, target))
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


def edit_loss(model, processor, batch, conditions, clean: bool):
    """Loss of every token (B, N), and where the target is the source.

    By tokens an edit changes far more than its patches, since the tokenizer looks at the whole picture. `clean`
    targets have the source's code in every patch whose pixels did not change.
    """
    instructions, _, pixels, unchanged = batch
    source, target = encode_tokens(model, pixels.flatten(0, 1)).view(len(instructions), 2, -1).unbind(1)
    if clean:
        target = torch.where(unchanged, source, target)
    prompt = processor.edit_rows(instructions, conditions)
    embeds = embed_prompt(model, prompt, image_features(model, pixels[:, 0]), source)
    return token_loss(model, embeds, prompt, target), source == target


def picture_loss(model, processor, batch, conditions):
    _, captions, pixels, _ = batch
    prompt = processor.generate_rows(captions, conditions)
    return token_loss(model, embed_prompt(model, prompt), prompt, encode_tokens(model, pixels[:, 0]))


def train_lm(stage: Stage, directory: Path, continued: bool) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(directory / "model") if continued else train_tokenizer()
    model = build_model(torch.load(directory / "vq.pt", weights_only=True), tokenizer)
    if continued:
        model.load_state_dict(load_file(directory / "model" / "model.safetensors"))
    processor = ClearEditProcessor(tokenizer, IMAGE_SIZE, TOKENS)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".layers." in n]
    inside = {id(p) for p in matrices} if stage.muon else set()
    groups = [
        {"params": [p for p in trained if p.ndim > 1 and id(p) not in inside], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))]
    if stage.muon:
        optimizers.append(Muon(matrices, lr=stage.lr))
    data, test = batches(stage), held_out()
    texts = round(stage.batch * stage.text_share)
    for step in (bar := tqdm(range(stage.steps), desc="language model")):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = stage.rate(step, floor=0.05)
        rows = next(data)
        conditions = rng.choice([FULL, PART, UNCOND], stage.batch - texts, p=stage.conditions).tolist()
        loss, same = edit_loss(model, processor, [part[texts:] for part in rows], conditions, stage.clean)
        weight = torch.where(same, 1.0, stage.changed_weight)
        text_conditions = rng.choice([FULL, UNCOND], texts, p=[0.9, 0.1]).tolist()
        text_loss = picture_loss(model, processor, [part[:texts] for part in rows], text_conditions)
        share = texts / stage.batch
        model.zero_grad()
        ((1 - share) * (loss * weight).sum() / weight.sum() + share * text_loss.mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == stage.steps:
            with torch.no_grad():
                loss, same = edit_loss(model, processor, test, [FULL] * len(test[0]), stage.clean)
            bar.write(f"step {step + 1}: held-out loss same {loss[same].mean():.3f} changed {loss[~same].mean():.3f}")
            state = {name: tensor.to(torch.bfloat16).clone() for name, tensor in model.state_dict().items()}
            model.save_pretrained(directory / "model", state_dict=state)
            processor.save_pretrained(directory / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES), help="run them in this order")
    parser.add_argument(
        "--output_dir", default="outputs/tiny_base", type=Path, help="model/ and vq.pt are written here"
    )
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "vq":
        train_vq(STAGES["vq"], arguments.output_dir)
    else:
        train_lm(STAGES[arguments.stage], arguments.output_dir, continued=arguments.stage != "lm")
