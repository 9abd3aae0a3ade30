"""The second half of the tiny Janus: tokenizer, SigLIP tower and language model, trained on edits and captions.

Two hundred thousand examples are too few for codes alone to teach what is where, so linear probes on the way say it
outright: which patch a state belongs to, what the source shows there, whether the edit changes it, and what the target
will show. They are thrown away with the training run.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import GRID, IMAGE_SIZE, PATCH, TOKENS, Batch, batches, held_out
from muon import Muon
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
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

from thinkclearly.data.shapes import PALETTE, SHAPES, packaged_photos, random_edit
from thinkclearly.models.janus.processor import BOS, EOS, IMAGE, PAD, ROLES, SPECIAL_TOKENS, SYSTEM, JanusProcessor
from thinkclearly.models.load import Checkpoint
from thinkclearly.models.protocol import position_ids
from thinkclearly.sequence import FULL, NO_SOURCE, UNCOND, drawing, named_row

HIDDEN, LAYERS, HEADS = 256, 6, 8
SPECIAL = (*SPECIAL_TOKENS, *ROLES["deepseek"])
CONTENTS = (1 + len(SHAPES), 1 + len(PALETTE))


@dataclass
class Stage:
    """One run: `steps` of `batch` rows at `lr`, constant after the warm-up or (`decay`) falling to zero."""

    seed: int
    steps: int
    batch: int
    lr: float
    warmup: int
    decay: bool = False
    conditions: tuple[float, float, float] = (0.90, 0.05, 0.05)  # full, no_source, uncond
    text_share: float = 1 / 12  # of text-to-image among the rows
    changed_weight: float = 3.0  # of tokens that the edit changes
    probes: float = 1.0  # weight of the probes' losses
    vision: float = 1.0  # weight of the SigLIP tower's own loss

    def rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup) * (1 - step / self.steps if self.decay else 1.0)


STAGES = {
    "lm": Stage(seed=4, steps=1750, batch=24, lr=2e-3, warmup=100, vision=0.2),
    "shapes": Stage(seed=6, steps=2000, batch=24, lr=2e-3, warmup=30),
    "anneal": Stage(seed=9, steps=1200, batch=24, lr=2e-3, warmup=10, decay=True, probes=0.2),
}


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the generator's own words, with DeepSeek's special tokens."""
    photos = packaged_photos("train")
    edits = [random_edit(3, i, photos) for i in range(4000)]
    text = [e.instruction for e in edits] + [e.before.caption() for e in edits] + [SYSTEM, "What is in the picture?"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 512, "special_tokens": list(SPECIAL), "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(show_progress=False, **options))
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[t for t in SPECIAL if t not in (BOS, EOS, PAD)],
    )


def build_model(vq_config: JanusVQVAEConfig, vq_state: dict, tokenizer) -> JanusForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=640,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
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
            vq_config=vq_config,
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


class Probes(nn.Module):
    """Linear readings of the states on the way, each with its cross-entropy."""

    def __init__(self):
        super().__init__()
        contents = sum(CONTENTS)
        self.seen = nn.Linear(HIDDEN, contents)  # SigLIP features: what the picture shows
        self.place = nn.Linear(HIDDEN, 2 * GRID)  # layer 2, source and output: row and column
        self.source = nn.Linear(HIDDEN, contents)  # layer 2, source: what the source shows
        self.planned = nn.Linear(HIDDEN, 2 * contents + 2)  # layer 4, output: source, target, changed
        self.drawn = nn.Linear(HIDDEN, contents + 2)  # last, output: target, changed

    def vision(self, features: torch.Tensor, contents: torch.Tensor) -> torch.Tensor:
        """Mean loss of what SigLIP features (B, N, H) say about `contents`, long (B, N, 2)."""
        return reading(self.seen(features), CONTENTS, contents, torch.where(contents[..., 0] > 0, 3.0, 1.0))

    def losses(self, states, prompt, batch: Batch, full: torch.Tensor) -> torch.Tensor:
        """Mean loss of the other readings on rows `full`, bool (B,), whose prompt says everything.

        Args:
            states: hidden states (B, L, H) of every layer, embeddings first.
        """
        source, target = batch.contents[full].unbind(1)
        changed = (~batch.unchanged[full]).long().unsqueeze(-1)
        index = torch.arange(TOKENS)
        where = torch.stack([index // GRID, index % GRID], -1).expand(len(source), -1, -1)
        slot = (prompt.known_slots[full] + index).unsqueeze(-1).expand(-1, -1, HIDDEN)
        early, late, last = (states[i][full] for i in (2, 4, -1))
        read, out = early.gather(1, slot), slice(-TOKENS, None)
        weight = torch.where(changed[..., 0] > 0, 3.0, 1.0)
        return (
            reading(self.place(read), (GRID, GRID), where)
            + reading(self.source(read), CONTENTS, source)
            + reading(self.place(early[:, out]), (GRID, GRID), where)
            + reading(
                self.planned(late[:, out]), CONTENTS * 2 + (2,), torch.cat([source, target, changed], -1), weight
            )
            + reading(self.drawn(last[:, out]), CONTENTS + (2,), torch.cat([target, changed], -1), weight)
        ) / 5


def reading(logits, sizes, labels, weight=None) -> torch.Tensor:
    """Mean cross-entropy of several classifications side by side: logits (B, N, sum of sizes), labels (B, N, k)."""
    parts = [
        F.cross_entropy(part.flatten(0, 1), label.flatten(), reduction="none")
        for part, label in zip(logits.split(sizes, -1), labels.unbind(-1))
    ]
    loss = torch.stack(parts).mean(0)
    return loss.mean() if weight is None else (loss * weight.flatten()).sum() / weight.sum()


def token_loss(family, embeds, prompt, target):
    """Loss of every output token (B, N), and every layer's states (B, L, H)."""
    embeds = torch.cat([embeds, family.embed_codes(target[:, :-1])], dim=1)
    mask = F.pad(prompt.attention_mask, (0, TOKENS - 1), value=1)
    states = family.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states
    logits = family.code_logits(states[-1][:, -TOKENS:])
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return loss.view(target.shape), states


def edit_loss(checkpoint: Checkpoint, probes, batch: Batch, conditions):
    """Loss of every token (B, N), where the target is the source, the probes' loss and the SigLIP tower's.

    By tokens an edit changes far more than its patches, since the tokenizer looks at the whole picture. The targets
    keep the source's code in every patch whose pixels did not change.
    """
    family, pixels = checkpoint.token_model, batch.pixels.flatten(0, 1)
    source, target = family.encode(pixels).view(len(batch), 2, -1).unbind(1)
    target = torch.where(batch.unchanged, source, target)
    samples = [drawing(words, [i]) for i, words in enumerate(batch.instructions)]
    prompt = checkpoint.processor.rows([*map(named_row, samples, conditions)])
    features = family.see(pixels)  # of the targets, too: twice as much to learn to see
    loss, states = token_loss(family, family.embed_prompt(prompt, features[::2], source), prompt, target)
    full = torch.tensor([name == FULL for name in conditions])
    seen = probes.vision(checkpoint.network.model.aligner(features), batch.contents.flatten(0, 1))
    return loss, source == target, probes.losses(states, prompt, batch, full), seen


def picture_loss(checkpoint: Checkpoint, batch: Batch, conditions) -> torch.Tensor:
    family = checkpoint.token_model
    prompt = checkpoint.processor.rows([*map(named_row, map(drawing, batch.captions), conditions)])
    return token_loss(family, family.embed_prompt(prompt), prompt, family.encode(batch.pixels[:, 0]))[0]


def optimizers(model, probes, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    matrices = {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".layers." in n}
    others = [p for n, p in model.named_parameters() if p.requires_grad and n not in matrices]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in others if p.ndim < 2] + list(probes.parameters()), "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)), Muon(matrices.values(), lr=lr)]


def save(checkpoint: Checkpoint, probes, directory: Path) -> None:
    model = checkpoint.network
    state = {name: tensor.to(torch.bfloat16).clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory / "model", state_dict=state)
    checkpoint.processor.save_pretrained(directory / "model")
    torch.save(probes.state_dict(), directory / "probes.pt")


def train_language_model(stage: Stage, vq_config: JanusVQVAEConfig, directory: Path, continued: bool) -> None:
    """Runs one stage; `continued` starts from the model of the stage before."""
    torch.manual_seed(0)
    rng = np.random.default_rng(stage.seed)
    tokenizer = AutoTokenizer.from_pretrained(directory / "model") if continued else train_tokenizer()
    model = build_model(vq_config, torch.load(directory / "vq.pt", weights_only=True), tokenizer)
    probes = Probes()
    if continued:
        model.load_state_dict(load_file(directory / "model" / "model.safetensors"))
        probes.load_state_dict(torch.load(directory / "probes.pt", weights_only=True))
    checkpoint = Checkpoint(model, JanusProcessor(tokenizer, IMAGE_SIZE, TOKENS))
    steppers = optimizers(model, probes, stage.lr)
    data, test = batches(stage.seed, stage.batch), held_out()
    texts = round(stage.batch * stage.text_share)
    for step in (bar := tqdm(range(stage.steps), desc="language model", mininterval=10)):
        for group in (group for optimizer in steppers for group in optimizer.param_groups):
            group["lr"] = stage.rate(step)
        rows = next(data)
        conditions = rng.choice([FULL, NO_SOURCE, UNCOND], stage.batch - texts, p=stage.conditions).tolist()
        text_conditions = rng.choice([FULL, UNCOND], texts, p=[0.9, 0.1]).tolist()
        with torch.autocast("cpu", torch.bfloat16):
            loss, same, readings, seen = edit_loss(checkpoint, probes, rows.rows(texts), conditions)
            text_loss = picture_loss(checkpoint, rows.rows(0, texts), text_conditions)
        weight = torch.where(same, 1.0, stage.changed_weight)
        share = texts / stage.batch
        codes = (1 - share) * (loss * weight).sum() / weight.sum() + share * text_loss.mean()
        model.zero_grad()
        (codes + stage.probes * readings + stage.vision * seen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == stage.steps:
            with torch.no_grad():
                loss, same, readings, seen = edit_loss(checkpoint, probes, test, [FULL] * len(test))
            local = torch.tensor([(~s).float().mean() < 0.5 for s in same])
            bar.write(
                f"step {step + 1}: held-out loss where the source stays {loss[same].mean():.3f}, where it changes "
                f"{loss[~same].mean():.3f} ({loss[local][~same[local]].mean():.3f} in local edits), "
                f"probes {readings:.3f}, vision {seen:.3f}"
            )
            save(checkpoint, probes, directory)
