"""Train the tiny Janus that ships in thinkclearly/tiny_janus, from nothing: autoencoder, codebook, then the language model.

    python scripts/make_tiny_janus.py vq   --output_dir outputs/tiny_base
    python scripts/make_tiny_janus.py lm   --output_dir outputs/tiny_base

The result has no CLEAR head: it is a base model in the manner of Janus-4o, which the demo fine-tunes.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from tqdm import tqdm
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from thinkclearly.data.shapes import packaged_photos, picture_size, random_edit
from thinkclearly.images import Letterbox
from thinkclearly.models.backbone import embed_prompt, encode_tokens, image_features, teacher_forced_hidden
from thinkclearly.models.prompt import BOS, EOS, FULL, PAD, PART, SPECIAL_TOKENS, SYSTEM, UNCOND, ClearEditProcessor

import os
MODE=int(os.environ.get('MODE','0'))
IMAGE_SIZE, PATCH, CODES, HIDDEN, LAYERS = 64, 8, 1024, 256, 5


def vq_config():
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


class Pictures(torch.utils.data.Dataset):
    """Sources and targets of random edits as (2, 3, S, S) in [-1, 1]."""

    def __init__(self, seed, photos):
        self.seed, self.photos = seed, photos

    def __len__(self):
        return 10**7

    def __getitem__(self, index):
        source, target, _ = random_edit(self.seed, index, self.photos).render(IMAGE_SIZE)
        pixels = np.stack([np.asarray(source), np.asarray(target)]).astype(np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def reset_convolutions(model):
    """PyTorch's own initialisation instead of the 0.02 normal, which starts the autoencoder too flat."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
            if MODE == 2 and name.endswith(("conv2", "proj_out")):
                torch.nn.init.zeros_(module.weight)
            if MODE==1 and name.endswith(("conv_in", "downsample.conv", "upsample.conv", "conv2", "nin_shortcut")) :
                with torch.no_grad():
                    module.weight[1::2] = 0
                    module.bias[1::2] = 0 if name.endswith("conv2") else torch.randn_like(module.bias[1::2])*0.7


def latents(vq, pixels):
    return F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)


def quantize(vq, z):
    codebook = F.normalize(vq.quantize.embedding.weight, dim=-1)
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    ids = (flat.detach() @ codebook.detach().T).argmax(-1)
    q = codebook[ids].view(z.shape[0], z.shape[2], z.shape[3], -1).permute(0, 3, 1, 2)
    return ids, q


def psnr(a, b):
    return 10 * torch.log10(4 / ((a.clamp(-1, 1) - b) ** 2).mean((1, 2, 3)))


def train_vq(args):
    torch.manual_seed(0)
    vq = JanusVQVAE(vq_config())
    reset_convolutions(vq)
    vq = vq.to(memory_format=torch.channels_last)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    photos = packaged_photos("train")
    loader = iter(torch.utils.data.DataLoader(Pictures(1, photos), batch_size=args.batch // 2, num_workers=args.workers))
    test = torch.cat([Pictures(2, packaged_photos("test"))[i][:1] for i in range(64)])
    optimizer = torch.optim.AdamW(vq.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    total = args.ae_steps + args.vq_steps
    started = time.time()
    for step in range(total):
        if step == args.ae_steps:
            fit_codebook(vq, loader)
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        x = next(loader).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        z = latents(vq, x)
        extra = 0.0
        if step >= args.ae_steps:
            _, q = quantize(vq, z)
            extra = ((q - z.detach()) ** 2).sum(1).mean() + 0.25 * ((q.detach() - z) ** 2).sum(1).mean()
            z = z + (q - z).detach()
        y = vq.decoder(vq.post_quant_conv(z))
        loss = F.mse_loss(y, x) + 0.1 * F.l1_loss(y, x)
        optimizer.zero_grad()
        (loss + 0.1 * extra).backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0 or step + 1 == total:
            with torch.no_grad():
                z = latents(vq, test)
                used = 0
                if step >= args.ae_steps:
                    ids, z = quantize(vq, z)
                    used = len(ids.unique())
                value = psnr(vq.decoder(vq.post_quant_conv(z)), test).mean()
            print(f"step {step + 1} loss {loss.item():.5f} test psnr {value:.2f} used {used} {time.time() - started:.0f}s", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == total:
            state = vq.state_dict()
            state = {k: v.contiguous() for k, v in state.items()}
            state["quantize.embedding.weight"] = F.normalize(state["quantize.embedding.weight"], dim=-1)
            torch.save(state, out / "vq.part")
            (out / "vq.part").replace(out / "vq.pt")


@torch.no_grad()
def fit_codebook(vq, loader):
    z = [latents(vq, next(loader).flatten(0, 1)).permute(0, 2, 3, 1).reshape(-1, 8) for _ in range(60)]
    kmeans = MiniBatchKMeans(CODES, batch_size=8192, n_init=1, random_state=0, max_iter=60).fit(torch.cat(z).numpy())
    vq.quantize.embedding.weight.copy_(F.normalize(torch.from_numpy(kmeans.cluster_centers_).float(), dim=-1))


def train_tokenizer(directory):
    """Byte-level BPE on the generator's own words, with DeepSeek's special tokens."""
    photos = packaged_photos("train")
    edits = [random_edit(3, i, photos) for i in range(4000)]
    text = [e.instruction for e in edits] + [e.before.caption() for e in edits] + [SYSTEM, "What is in the picture?"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in (BOS, EOS, PAD)],
    )


def build_model(vq_state, tokenizer):
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
        num_image_tokens=(IMAGE_SIZE // PATCH) ** 2,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq_config(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vq_state)
    model.model.vqmodel.requires_grad_(False)
    # The input table starts as the codebook: alike patches begin alike. It is a table of its own from then on.
    with torch.no_grad():
        model.model.generation_embeddings.weight.copy_(vq_state["quantize.embedding.weight"])
    return model


class Edits(torch.utils.data.Dataset):
    """Random edits, rendered: instruction, caption, and uint8 (2, 3, S, S)."""

    def __init__(self, seed, photos):
        self.seed, self.photos = seed, photos

    def __len__(self):
        return 10**7

    def __getitem__(self, index):
        edit = random_edit(self.seed, index, self.photos)
        size = picture_size(self.seed, index, IMAGE_SIZE)
        box = Letterbox(*size, IMAGE_SIZE)
        pair = [np.asarray(box.fit(picture)) for picture in edit.render(*size)[:2]]
        return edit.instruction, edit.before.caption(), np.stack(pair)


def collate(rows):
    pixels = torch.from_numpy(np.stack([r[2] for r in rows])).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return [r[0] for r in rows], [r[1] for r in rows], pixels


def edit_loss(model, processor, batch, conditions):
    instructions, _, pixels = batch
    source, target = encode_tokens(model, pixels.flatten(0, 1)).view(len(instructions), 2, -1).unbind(1)
    prompt = processor.edit_rows(instructions, conditions)
    embeds = embed_prompt(model, prompt, image_features(model, pixels[:, 0]), source)
    return token_loss(model, embeds, prompt, target), source, target


def picture_loss(model, processor, batch, conditions):
    _, captions, pixels = batch
    target = encode_tokens(model, pixels[:, 0])
    prompt = processor.generate_rows(captions, conditions)
    return token_loss(model, embed_prompt(model, prompt), prompt, target)


def token_loss(model, embeds, prompt, target):
    logits = model.model.generation_head(teacher_forced_hidden(model, embeds, prompt.attention_mask, target))
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)


def train_lm(args):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    out = Path(args.output_dir)
    tokenizer = train_tokenizer(out)
    model = build_model(torch.load(args.vq or out / "vq.pt", weights_only=True), tokenizer)
    processor = ClearEditProcessor(tokenizer, IMAGE_SIZE, (IMAGE_SIZE // PATCH) ** 2)
    params = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in params if p.ndim > 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    workers = {"num_workers": 1, "prefetch_factor": 4}
    loader = iter(torch.utils.data.DataLoader(Edits(4, packaged_photos("train")), args.batch, collate_fn=collate, **workers))
    test = collate([Edits(5, packaged_photos("test"))[i] for i in range(64)])
    print("parameters", sum(p.numel() for p in model.parameters()), "tokens of a prompt", len(processor.edit_ids(test[0][0])), flush=True)
    started = time.time()
    n_text = args.batch // 8
    for step in range(args.lm_steps):
        progress = step / args.lm_steps
        lr = args.lr * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        instructions, captions, pixels = next(loader)
        # Guidance rows: mostly full ones while copying is being learned, then the shares that fine-tuning uses too.
        shares = [0.85, 0.1, 0.05] if progress < 0.3 else [0.6, 0.3, 0.1]
        conditions = rng.choice([FULL, PART, UNCOND], args.batch - n_text, p=shares).tolist()
        loss = edit_loss(model, processor, (instructions[n_text:], captions[n_text:], pixels[n_text:]), conditions)[0].mean()
        text_conditions = rng.choice([FULL, UNCOND], n_text, p=[0.9, 0.1]).tolist()
        text_loss = picture_loss(model, processor, (instructions[:n_text], captions[:n_text], pixels[:n_text]), text_conditions).mean()
        optimizer.zero_grad()
        ((1 - n_text / args.batch) * loss + n_text / args.batch * text_loss).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if (step + 1) % args.log == 0:
            with torch.no_grad():
                full, source, target = edit_loss(model, processor, test, [FULL] * 64)
                part = edit_loss(model, processor, test, [PART] * 64)[0].mean()
                same = source == target
            print(
                f"step {step + 1} loss {loss:.3f} t2i {text_loss:.3f} test full {full.mean():.3f} same {full[same].mean():.3f} "
                f"changed {full[~same].mean():.3f} part {part:.3f} ({same.float().mean():.2f} same) {time.time() - started:.0f}s",
                flush=True,
            )
        if (step + 1) % 250 == 0 or step + 1 == args.lm_steps:
            save(model, processor, out / "model")


def save(model, processor, directory):
    state = {k: v.to(torch.bfloat16).clone() for k, v in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state)
    processor.save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=["vq", "lm"])
    parser.add_argument("--output_dir", default="outputs/tiny_base")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ae_steps", type=int, default=1200)
    parser.add_argument("--vq_steps", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lm_steps", type=int, default=3000)
    parser.add_argument("--log", type=int, default=50)
    parser.add_argument("--vq")
    args = parser.parse_args()
    train_vq(args) if args.stage == "vq" else train_lm(args)
