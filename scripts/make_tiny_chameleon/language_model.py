"""The second half of the tiny Chameleon: its language model, on drawings, critiques, sub-goals and captions.

A hundred thousand streams are too few for tokens alone to teach what is where, so linear probes on the way say it
outright: which patch comes next, what it will show, and what the patch just read shows. They are thrown away.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import CODES, vq_config
from data import GRID
from muon import Muon
from parallel import backward
from streams import NOWHERE, Stream, pools
from tokenizer import train_tokenizer
from torch import nn
from tqdm import tqdm

from thinkclearly.data.shapes import PALETTE, SHAPES
from thinkclearly.models.chameleon.random import random_chameleon

HIDDEN, LAYERS, HEADS = 192, 5, 6
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 1024,
}
STREAMS = {"drawing": 16000, "critique": 12000, "subgoals": 3000, "caption": 5000}
# Parts of a batch, each of one kind: until step `READ` mostly drawings, then mostly what has to be read and judged.
PARTS = (("drawing", 12), ("drawing", 12), ("critique", 6), ("critique", 6), ("subgoals", 3), ("caption", 8))
READ, READ_PARTS = (
    800,
    (("drawing", 8), ("critique", 6), ("critique", 6), ("critique", 6), ("caption", 14), ("subgoals", 3)),
)
STEPS, LEARNING_RATE, WARMUP, DECAY = 1500, 2e-3, 60, 0.6  # the last share of the steps falls to zero
WORDS = 3.0  # how much more words count from `READ` on
PROBES = 0.5  # their weight
CENTRES = [1, 4, 6]  # rows and columns of patches that lie in the middle of the nine places
SPOTS = len(CENTRES) ** 2 + 1
CONTENTS = (1 + len(SHAPES), 1 + len(PALETTE))


def rate(step: int) -> float:
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP, max(0.0, (1 - step / STEPS) / DECAY))


class Probes(nn.Module):
    """Linear readings of the states on the way, each with its cross-entropy."""

    def __init__(self):
        super().__init__()
        self.place = nn.Linear(HIDDEN, 2 * GRID)  # layer 2: row and column of the patch to come
        self.read = nn.Linear(HIDDEN, sum(CONTENTS))  # layer 2: what the patch just read shows
        self.planned = nn.Linear(HIDDEN, sum(CONTENTS))  # layer 3: what the patch to come will show
        self.drawn = nn.Linear(HIDDEN, sum(CONTENTS))  # last layer: the same
        self.shown = nn.Linear(HIDDEN, SPOTS * sum(CONTENTS))  # layer 3, after a picture: what it shows where
        self.wanted = nn.Linear(HIDDEN, SPOTS * (sum(CONTENTS) + 2))  # layer 4: what was asked for, whether it differs

    def forward(self, states: list[torch.Tensor], weights: torch.Tensor, contents: torch.Tensor) -> torch.Tensor:
        """Mean loss of the readings of states (B, T, H) of every layer, embeddings first."""
        own = contents[..., 0] != NOWHERE
        comes = (own & (weights > 0))[:, 1:]
        heavy = weights[:, 1:][comes]
        there = contents[:, 1:][comes]
        where = torch.stack([there[:, 0] // GRID, there[:, 0] % GRID], -1)
        return (
            reading(self.place(states[2][:, :-1][comes]), (GRID, GRID), where)
            + reading(self.read(states[2][own]), CONTENTS, contents[own][:, 1:])
            + reading(self.planned(states[3][:, :-1][comes]), CONTENTS, there[:, 1:], heavy)
            + reading(self.drawn(states[-1][:, :-1][comes]), CONTENTS, there[:, 1:], heavy)
        ) / 4

    def judged(self, states: list[torch.Tensor], contents: torch.Tensor) -> torch.Tensor:
        """Mean loss of what the state after the first picture tells, of streams that are captions or critiques."""
        loss, rows = 0.0, [(b, (row[:, 0] == GRID**2 - 1).nonzero()[:, 0].tolist()) for b, row in enumerate(contents)]
        shown = torch.stack([spots(contents[b], ends[0]) for b, ends in rows])
        at = torch.tensor([ends[0] + 1 for _, ends in rows])
        told = [states[i][range(len(rows)), at] for i in (3, 4)]
        loss = reading(self.shown(told[0]).unflatten(1, (SPOTS, -1)).flatten(0, 1), CONTENTS, shown.flatten(0, 1))
        asked = [
            k for k, (_, ends) in enumerate(rows) if len(ends) == 2 and ends[0] > GRID**2 + 4
        ]  # there is a prompt
        if asked:
            wanted = torch.stack([spots(contents[rows[k][0]], rows[k][1][1]) for k in asked])
            differs = (wanted != shown[asked]).any(-1, keepdim=True).long()
            logits = self.wanted(told[1][asked]).unflatten(1, (SPOTS, -1)).flatten(0, 1)
            labels = torch.cat([wanted, differs], -1).flatten(0, 1)
            loss = loss + reading(logits, (*CONTENTS, 2), labels, 1 + 4 * differs.flatten())
        return loss


def spots(contents: torch.Tensor, end: int) -> torch.Tensor:
    """Shape and colour at the nine places, then of the ground, long (10, 2), of the picture that ends at `end`."""
    shown = contents[end + 1 - GRID**2 : end + 1, 1:]
    ground = shown[shown[:, 0] == 0].mode(0).values
    return torch.cat([shown.unflatten(0, (GRID, GRID))[CENTRES][:, CENTRES].flatten(0, 1), ground[None]])


def reading(logits, sizes, labels, weight=None) -> torch.Tensor:
    """Mean cross-entropy of several classifications side by side: logits (n, sum of sizes), labels (n, k)."""
    if not len(labels):
        return logits.sum()
    parts = [F.cross_entropy(p, k, reduction="none") for p, k in zip(logits.split(sizes, -1), labels.unbind(-1))]
    loss = torch.stack(parts).mean(0)
    return loss.mean() if weight is None else (loss * weight).sum() / weight.sum()


def hidden_states(network, ids: torch.Tensor) -> list[torch.Tensor]:
    """States (B, T, H) of every layer, embeddings first, the last one normed. Padding stands at the right: no mask."""
    core = network.model
    states = [core.embed_tokens(ids)]
    angles = core.rotary_emb(states[0], position_ids=torch.arange(ids.shape[1])[None])
    for layer in core.layers:
        states.append(layer(states[-1], position_embeddings=angles)[0])
    return [*states[:-1], core.norm(states[-1])]


def stacked(streams: list[Stream], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids long (B, T), weights float (B, T), contents long (B, T, 3), padded at the right."""
    length = max(len(stream.ids) for stream in streams)
    ids = torch.full((len(streams), length), pad)
    weights, contents = torch.zeros(len(streams), length), torch.full((len(streams), length, 3), NOWHERE)
    for i, stream in enumerate(streams):
        n = len(stream.ids)
        ids[i, :n] = torch.from_numpy(stream.ids).long()
        weights[i, :n] = torch.from_numpy(stream.weights).float()
        contents[i, :n] = torch.from_numpy(stream.contents).long()
    return ids, weights, contents


def optimizers(network, probes) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    matrices = {n: p for n, p in network.named_parameters() if p.requires_grad and n.endswith("_proj.weight")}
    others = [p for n, p in network.named_parameters() if p.requires_grad and n not in matrices]
    return [
        torch.optim.AdamW([*others, *probes.parameters()], lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
        Muon(matrices.values(), lr=LEARNING_RATE),
    ]


@torch.no_grad()
def begin_alike(network, codebook: torch.Tensor, code_ids: list[int]) -> None:
    """Codes of alike patches begin with alike embeddings and alike rows of the head."""
    rows = 0.02 * codebook @ torch.randn(codebook.shape[1], HIDDEN) / codebook.shape[1] ** 0.5
    for table in (network.model.embed_tokens.weight, network.lm_head.weight):
        table[code_ids] = rows


def save(network, processor, directory: Path) -> None:
    """Language model and decoder in bfloat16; encoder and codebook, which the codes depend on, in float32."""
    exact = ("model.vqmodel.encoder", "model.vqmodel.quant")
    state = {n: t.clone() if n.startswith(exact) else t.bfloat16() for n, t in network.state_dict().items()}
    network.save_pretrained(directory / "model", state_dict=state)
    processor.save_pretrained(directory / "model")


def train_language_model(directory: Path) -> None:
    """Makes what is missing, and goes on from `training.pt` where there is one."""
    tokenizer = train_tokenizer(CODES)
    tokenizer.save_pretrained(directory / "tokenizer")
    network, processor = random_chameleon(SIZES, vq_config().to_dict(), tokenizer, seed=0)
    network.model.vqmodel.load_state_dict(torch.load(directory / "vq.pt"))
    begin_alike(network, network.model.vqmodel.quantize.embedding.weight, processor.code_ids)
    probes, step = Probes(), 0
    steppers, rng = optimizers(network, probes), np.random.default_rng(4)
    learning = [p for p in [*network.parameters(), *probes.parameters()] if p.requires_grad]
    if (directory / "training.pt").exists():
        step, kept, *states = torch.load(directory / "training.pt")
        for parameter, value in zip(learning, kept):
            parameter.data.copy_(value)
        for optimizer, state in zip(steppers, states):
            optimizer.load_state_dict(state)
        rng = np.random.default_rng((4, step))
    streams = pools(STREAMS, directory)
    seen = {}
    bar = tqdm(total=STEPS, initial=step, desc="language model", mininterval=20)
    while step < STEPS:
        for group in (group for optimizer in steppers for group in optimizer.param_groups):
            group["lr"] = rate(step)
        mix = PARTS if step < READ else READ_PARTS
        parts = [
            draw(kind, streams[kind], count, rng, processor.pad_id, WORDS if step >= READ else 1.0)
            for kind, count in mix
        ]
        total = sum(weights[:, 1:].sum() for _, (_, weights, _) in parts)

        def loss(part, total=total, step=step):
            return part_loss(network, probes, part, total, step >= READ)

        for kind, value, reading_loss in backward(loss, parts, learning):
            for name, number in ((kind, value), ("probes", reading_loss)):
                seen[name] = 0.98 * seen.get(name, number) + 0.02 * number
        nn.utils.clip_grad_norm_(learning, 1.0)
        for optimizer in steppers:
            optimizer.step()
        step += 1
        bar.update()
        if step % 50 == 0:
            bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in seen.items()))
        if step % 200 == 0 or step == STEPS:
            save(network, processor, directory)
            torch.save((step, learning, *(o.state_dict() for o in steppers)), directory / "training.tmp")
            (directory / "training.tmp").rename(directory / "training.pt")


def draw(kind: str, streams: list[Stream], count: int, rng: np.random.Generator, pad: int, words: float):
    """`count` streams of neighbouring lengths; their words count `words` times as much."""
    first = int(rng.integers(max(1, len(streams) - 8 * count)))
    chosen = first + rng.permutation(min(8 * count, len(streams) - first))[:count]
    ids, weights, contents = stacked([streams[i] for i in chosen], pad)
    return kind, (ids, weights * torch.where(contents[..., 0] == NOWHERE, words, 1.0), contents)


def part_loss(network, probes: Probes, part, total, judge: bool):
    """A part's share of the loss of a step; its kind, mean loss and the probes', to report."""
    kind, (ids, weights, contents) = part
    states = hidden_states(network, ids)
    counts = weights[:, 1:] > 0
    logits = network.lm_head(states[-1][:, :-1][counts])
    heavy = weights[:, 1:][counts]
    loss = (F.cross_entropy(logits, ids[:, 1:][counts], reduction="none") * heavy).sum()
    readings = probes(states, weights, contents)
    if judge and kind in ("critique", "caption"):
        judged = probes.judged(states, contents)
        readings = readings + 2 * judged
    report = kind, (loss / heavy.sum()).item(), readings.item()
    return loss / total + PROBES / len(PARTS) * readings, report
