"""How fast and how lean a training step is: `python -m benchmarks.training`.

Ways to take the same step, timed in turn on the same records: reading the batch, forward, backward and AdamW. Writes
training.json and training.md. Knows how the runs are made and compared, not how a loss is computed.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import transformers
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from thinkclearly.bench.measure import interleaved, now
from thinkclearly.bench.scripted import SIZES, SMALL_TOWERS, random_model
from thinkclearly.data import sources
from thinkclearly.data.collator import Collator
from thinkclearly.data.features import cache_features
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.evaluation.report import machine
from thinkclearly.files import write_json, write_text
from thinkclearly.models import cross_entropy
from thinkclearly.models.instruction_head import ClearConfig
from thinkclearly.models.load import Checkpoint, load_checkpoint, load_empty
from thinkclearly.reporting.tables import markdown_table
from thinkclearly.training import memory
from thinkclearly.training.adapters import add_lora
from thinkclearly.training.methods import parse_options
from thinkclearly.training.setup import build_model

ORIGINAL, EVERYWHERE, OURS = "the original's step", "logits everywhere", "ours"
WHOLE, CACHED, CHECKPOINTED = "ours, logits whole", "ours, cached features", "ours, activation checkpointing"
BF16 = "ours, bf16"
CLEAR_WEIGHT = 0.3
TITLES = {
    "tiny": "The tiny model",
    "mid": "A model of mid size, random weights",
    "7b": "Janus-Pro-7B's shape, random weights",
}
LAYERS = 30  # of Janus-Pro-7B
RECIPES = {"a40.yaml": 40, "rtx4090_qlora.yaml": 24}  # and the memory that the run must fit, GB
DEEPSEEK_7B = {
    "model_type": "multi_modality",
    "language_config": {
        "model_type": "llama",
        "vocab_size": 102400,
        "max_position_embeddings": 16384,
    },
}


@dataclass
class Step:
    """One way to take a step: how a batch is read, the loss of it, and what is different meanwhile."""

    read: Callable[[], list[dict]]
    loss: Callable[[dict], torch.Tensor]
    bf16: bool = False
    checkpointing: bool = False
    whole: bool = False


class Case:
    """A model, its records and the ways to train it; the learning rate is 0, so that all of them see one model.

    Args:
        name: of `TITLES`.
        batch_size: records of a step.
        folder: where data is prepared and features are kept.
    """

    def __init__(self, name: str, batch_size: int, device: torch.device, folder: Path):
        self.device = device
        if name == "tiny":
            checkpoint = load_checkpoint("tiny", device=device)
        else:
            options = {"towers": SMALL_TOWERS} if name == "mid" else {"dtype": torch.bfloat16}
            scripted, processor = random_model(SIZES[name], device=device, **options)
            checkpoint = Checkpoint(scripted.network, processor)
        side = checkpoint.processor.image_size
        rows = prepare_dataset(sources.shapes(batch_size, size=side, seed=12), checkpoint, folder)
        codes = checkpoint.token_model.codebook_size
        self.model = add_lora(checkpoint, name, ClearConfig(codes), r=8, lora_alpha=16, lora_dropout=0.0)
        self.model.to(device).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.0)
        cache = cache_features([rows], self.model, checkpoint.processor, folder)
        plain = Collator(checkpoint.processor, self.model.vocabulary)
        cached = Collator(checkpoint.processor, self.model.vocabulary, features=cache)
        records = rows.to_list()
        mixed = {"bf16": name == "7b"}  # whose weights are bfloat16: as a40.yaml trains it
        self.steps = {
            ORIGINAL: Step(lambda: [plain([_without_picture(row)]) for row in records], self.original, **mixed),
            EVERYWHERE: Step(lambda: [plain(records)], self.everywhere, **mixed),
            WHOLE: Step(lambda: [plain(records)], self.ours, whole=True, **mixed),
            OURS: Step(lambda: [plain(records)], self.ours, **mixed),
            CACHED: Step(lambda: [cached(records)], self.ours, **mixed),
            CHECKPOINTED: Step(lambda: [plain(records)], self.ours, checkpointing=True, **mixed),
        }
        if name != "7b":
            self.steps[BF16] = Step(lambda: [plain(records)], self.ours, bf16=True)
        batch = plain(records)
        self.image_tokens = batch["labels"].numel()
        self.sequence_tokens = batch["input_ids"].numel() + self.image_tokens - batch_size

    def ours(self, batch: dict) -> torch.Tensor:
        return self._weighted(self.model(**batch).nll, batch["labels"])

    def original(self, batch: dict) -> torch.Tensor:
        """One record, logits of its output positions whole, the picture's slot left as words (the original, bug 1).

        The tower is not run: where a row shows no picture its features are not read, so zeros of any kind will do.
        """
        family = self.model.token_model
        width = family.parts()[family.tower_part].config.hidden_size
        features = torch.zeros(1, self.image_tokens_each, width, dtype=self.model.base.dtype)
        batch = batch | {"seen_slots": batch["seen_slots"].fill_(-1), "features": features.to(self.device)}
        logits = self.model.teacher_forced_logits(**batch)
        return self._weighted(_cross_entropy(logits, batch["labels"]), batch["labels"])

    @property
    def image_tokens_each(self) -> int:
        return self.model.token_model.grid**2

    def everywhere(self, batch: dict) -> torch.Tensor:
        """A plain causal model's step: text and image logits at all positions, most of whose labels are ignored."""
        seen, language = [], self.model.token_model.language_model
        handle = language.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
        self.model._hidden(**batch)
        handle.remove()
        text, image = self.model.token_model.word_logits(seen[0]), self.model.logits(seen[0])
        before = image.shape[1] - self.image_tokens_each
        nll = _cross_entropy(image, F.pad(batch["labels"], (before, 0), value=-100))[:, before:]
        # What the text's loss keeps in memory, without a say in the result.
        return self._weighted(nll, batch["labels"]) + 0 * text.logsumexp(-1).mean()

    def _weighted(self, nll: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy.weighted_loss(nll, self.model.vocabulary.weights(labels, CLEAR_WEIGHT))

    @contextmanager
    def ready(self, step: Step) -> Iterator[None]:
        """The model as the step wants it."""
        chunk, base = cross_entropy.CHUNK, self.model.base
        cross_entropy.CHUNK = 10**9 if step.whole else chunk
        if step.checkpointing:
            base.activation_checkpointing_enable()
        try:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=step.bf16):
                yield
        finally:
            cross_entropy.CHUNK = chunk
            base.activation_checkpointing_disable()

    def read(self, step: Step) -> list[dict]:
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in step.read()]

    def run(self, step: Step) -> Mapping[str, float]:
        """One step: seconds in all, of them reading the batch, and the loss."""
        start = now(self.device)
        batches = self.read(step)
        reading = now(self.device) - start
        losses = [self.forward_backward(step, batch) for batch in batches]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"seconds": now(self.device) - start, "reading": reading, "loss": float(torch.stack(losses).mean())}

    def forward_backward(self, step: Step, batch: dict) -> torch.Tensor:
        with self.ready(step):
            loss = step.loss(batch)
        loss.backward()
        return loss.detach()

    def flops(self, step: Step) -> int:
        """Of forward and backward, what is computed again included; attention counted as matrix products, whole."""
        batches = self.read(step)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            for batch in batches:
                self.forward_backward(step, batch)
        return counter.get_total_flops()

    def kept(self, step: Step) -> int:
        """Bytes that a forward pass allocates and does not give back before the backward pass begins."""
        (batch, *_) = self.read(step)
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            with self.ready(step):
                loss = step.loss(batch)  # noqa: F841 what it holds is measured
            return torch.cuda.memory_allocated(self.device) - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile, self.ready(step):
            loss = step.loss(batch)  # noqa: F841
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())


def _without_picture(row: dict) -> dict:
    return {**row, "source": None}


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product, the best of some."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        start = now(device)
        left @ right
        seconds.append(now(device) - start)
    return 2 * size**3 / min(seconds)


def measure(case: Case, rounds: int, peaks: Mapping[bool, float], tick: Callable[[], None]) -> dict:
    """Figures of every row; ratios are taken within a round, against logits held whole at the same positions."""
    rows = {name: lambda step=step: case.run(step) for name, step in case.steps.items()}
    runs, found = interleaved(rows, rounds, tick), {}
    for name, step in case.steps.items():
        ratios = [base["seconds"] / run["seconds"] for base, run in zip(runs[WHOLE], runs[name])]
        seconds, flops = median(run["seconds"] for run in runs[name]), case.flops(step)
        found[name] = {
            "rounds": runs[name],
            "seconds": seconds,
            "reading": median(run["reading"] for run in runs[name]),
            "loss": runs[name][0]["loss"],
            "speed": [median(ratios), min(ratios), max(ratios)],
            "image_tokens_per_second": case.image_tokens / seconds,
            "sequence_tokens_per_second": case.sequence_tokens / seconds,
            "flops": flops,
            "utilisation": flops / seconds / peaks[step.bf16],
            "kept_bytes": case.kept(step),
        }
    return found


def write_config(folder: Path, layers: int) -> None:
    """A `config.json` of Janus-Pro-7B, of another depth perhaps."""
    language = DEEPSEEK_7B["language_config"] | {"num_hidden_layers": layers}
    write_json(folder / "config.json", DEEPSEEK_7B | {"language_config": language})


class Tracker(MemTracker):
    """MemTracker for models with frozen weights, on which it cannot put its hooks; gradients count as activations."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, False)


def traced_peak(folder: Path, layers: int) -> float:
    """Peak memory of whole steps (forward, backward, AdamW) by `a40.yaml`, over tensors without memory, GiB.

    Counts every allocation, where `thinkclearly.training.memory` counts what must be held: one checks the other.
    """
    write_config(folder, layers)
    options, _ = parse_options(["recipes/a40.yaml", "--base_model", str(folder)], "train")
    network, training = load_empty(str(folder)).to(getattr(torch, options.model.dtype)), options.training
    checkpoint = Checkpoint(network, None)
    family = checkpoint.token_model
    family.parts()[family.tokenizer_part].float()
    with torch.device("meta"):
        model = build_model(options, checkpoint, ClearConfig(family.codebook_size))
    if training.activation_checkpointing:
        model.activation_checkpointing_enable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        learning = [p for p in model.parameters() if p.requires_grad]
        for parameter in learning:
            parameter.data = parameter.data.float()
        batch, optimizer = memory.example_batch(model.token_model, 1), torch.optim.AdamW(learning)
        tracker = Tracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):  # the optimizer's states are there from the second step on
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.bf16):
                    loss = model(**batch).nll.mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")
    return sum(found["Total"] for found in peak.values()) / 2**30


def memory_at_7b(folder: Path) -> list[dict]:
    """What `thinkclearly train RECIPE --dry_run true` says for the 7B shape, with logits whole and in chunks, GiB."""
    write_config(folder, LAYERS)
    rows, chunk = [], cross_entropy.CHUNK
    for recipe, room in RECIPES.items():
        for size in (1, 4, 16):
            flags = ["--base_model", str(folder), "--per_device_train_batch_size", str(size)]
            options, method = parse_options([str(Path("recipes") / recipe), *flags], "train")
            row = {"recipe": recipe, "records": size, "room": room * 1e9 / 2**30}
            for name, cross_entropy.CHUNK in (("whole", 10**9), ("chunks", chunk)):
                text = memory.estimate_memory(options, method)
                for part in ("total", "logits, softmax, gradient"):
                    row[f"{name} {part.split(',')[0]}"] = float(re.search(rf"^{part} .*?([\d.]+)$", text, re.M)[1])
            rows.append(row)
    cross_entropy.CHUNK = chunk
    return rows


def render(results: Mapping) -> str:
    """The report in Markdown."""
    setup = results["setup"]
    blocks = [
        "# Training, measured",
        f"{setup['machine']}; torch {setup['torch']}, transformers {setup['transformers']}; written by "
        f"`{setup['command']}`. What the rows are: docs/performance.md. A matrix product reaches "
        + ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {name}" for name, peak in setup["matmul_peak"].items())
        + ". Speed is against logits held whole, in the same round: median, least to most over the rounds.",
    ]
    head = ["", "s a step", "of it reading", "speed", "image tokens/s", "tokens/s", "GFLOP", "share of peak"]
    head.append("MiB kept for backward")
    for case in results["models"].values():
        body = []
        for name, row in case["rows"].items():
            middle, least, most = row["speed"]
            body.append(
                [name, f"{row['seconds']:.3f}", f"{row['reading']:.3f}", f"{middle:.2f} × ({least:.2f}–{most:.2f})"]
                + [f"{row[f'{kind}_tokens_per_second']:.0f}" for kind in ("image", "sequence")]
                + [f"{row['flops'] / 1e9:.1f}", f"{row['utilisation']:.0%}", f"{row['kept_bytes'] / 2**20:.1f}"]
            )
        blocks += [f"## {case['title']}, {case['records']} records a step", markdown_table(head, body)]
    head = ["recipe", "records", "logits, whole", "in chunks", "total, whole", "in chunks", "fits"]
    body = []
    for row in results["memory"]:
        figures = [f"{row[f'{way} {part}']:.2f}" for part in ("logits", "total") for way in ("whole", "chunks")]
        fits = f"{'yes' if row['chunks total'] < row['room'] else 'no'}: {RECIPES[row['recipe']]} GB"
        body.append([f"`{row['recipe']}`", str(row["records"]), *figures, fits])
    one, two = results["traced"]
    whole = one + (LAYERS - 1) * (two - one)
    blocks += [
        "## Memory at Janus-Pro-7B's shape, GiB",
        "Estimates by `thinkclearly train RECIPE --dry_run true`, not measurements.",
        markdown_table(head, body),
        f"Another way to count, every allocation of whole steps of `a40.yaml` followed by torch's MemTracker: "
        f"{one:.2f} with one layer and {two:.2f} with two, so {whole:.2f} with {LAYERS}.",
    ]
    return "\n\n".join(blocks) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split(":")[0])
    parser.add_argument("--models", nargs="+", choices=TITLES, default=["tiny", "mid"], help="7b needs a GPU")
    parser.add_argument("--records", nargs="+", type=int, default=[4, 1], help="of a step, for each model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks"))
    arguments = parser.parse_args(argv)
    if len(arguments.records) < len(arguments.models):
        parser.error(f"--records {arguments.records}: expected one number for each of {arguments.models}")
    device = torch.device(arguments.device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    peaks = {name: matmul_peak(device, dtype) for name, dtype in dtypes.items()}
    command = f"python -m benchmarks.training --models {' '.join(arguments.models)} --rounds {arguments.rounds}"
    command += f" --records {' '.join(map(str, arguments.records))} --device {arguments.device}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    setup = {"machine": name, "torch": torch.__version__, "transformers": transformers.__version__}
    results = {"setup": setup | {"command": command, "matmul_peak": peaks}, "models": {}}
    with tqdm(desc="training", unit="step") as bar, tempfile.TemporaryDirectory() as folder:
        for name, records in zip(arguments.models, arguments.records):
            case = Case(name, records, device, Path(folder) / name)
            by_bf16 = {False: peaks["float32"], True: peaks["bfloat16"]}
            rows = measure(case, arguments.rounds, by_bf16, bar.update)
            results["models"][name] = {"title": TITLES[name], "records": records, "rows": rows}
        results["memory"] = memory_at_7b(Path(folder))
        results["traced"] = [traced_peak(Path(folder), layers) for layers in (1, 2)]
    write_json(arguments.output_dir / "training.json", results)
    write_text(arguments.output_dir / "training.md", render(results))


if __name__ == "__main__":
    main()
