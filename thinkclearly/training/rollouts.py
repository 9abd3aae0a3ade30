"""What GRPO learns from: pictures drawn or edited by the model as it is, beside ground truth, with their rewards.

Knows how samples are drawn and how they are shown to the model again. Does not know what is made of their rewards.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from thinkclearly.colour import seen
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.settings import EditSettings
from thinkclearly.generation.draw import draw, to_pictures
from thinkclearly.images import Letterbox, center_crop, load_image, load_photo
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor
from thinkclearly.sequence import drawing, named_rows

OWN, PARTNERS = "own", "partner's"  # ground truth, as the sheet of samples names it


@dataclass
class Rollout:
    """The S samples of a batch of records, prompt by prompt.

    Attributes:
        prompts: words of each sample; instructions where pictures are edited.
        groups: long (S,), what each sample is compared within: a record, so a pair's prompts are one group.
        prompt_numbers: long (S,), the same for samples of one prompt.
        class_ids: long (S, N), what was drawn.
        pictures: what the rewards judge: drawings, results of edits at the source's size, the crop of ground truth.
        logps: float32 (S, N), as the decoder drew; NaN for ground truth.
        truths: "" for what was drawn, else whose ground truth it is.
        shown: long (S,), which of the M source pictures belongs to a sample; empty where pictures are drawn.
        source_tokens, features: (M, N) and (M, N, W) of the source pictures.
        transformed: long (S, I, N), codes of each instruction's transform of the source.
        columns: the records' other columns, one value a sample.
        rewards: name of each reward function → float32 (S,), NaN where it does not apply.
        advantages: float32 (S,), once they are known.
        old_logps, reference_logps: float32 (S, N), from the first time that the samples were learnt from.
    """

    prompts: list[str]
    groups: torch.Tensor
    prompt_numbers: torch.Tensor
    class_ids: torch.Tensor
    pictures: list[Image.Image]
    logps: torch.Tensor
    truths: list[str]
    columns: dict[str, list]
    shown: torch.Tensor | None = None
    source_tokens: torch.Tensor | None = None
    features: torch.Tensor | None = None
    transformed: torch.Tensor | None = None
    rewards: dict[str, torch.Tensor] = field(default_factory=dict)
    advantages: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def model_inputs(self, index: torch.Tensor, processor: Processor, rows: Iterable[str]) -> dict[str, torch.Tensor]:
        """Samples `index`, long (C,), as `InstructionModel.forward` takes them: R rows of each, next to each other."""
        rows, device = list(rows), self.class_ids.device
        batch, pictures = {}, [[] for _ in index]
        if self.shown is not None:
            used, places = self.shown[index].unique(return_inverse=True)
            pictures = places[:, None].tolist()
            batch = {"source_tokens": self.source_tokens[used]}
            if self.features is not None:
                batch["features"] = self.features[used]
            batch["transformed"] = self.transformed[index].repeat_interleave(len(rows), dim=0)
        samples = [drawing(self.prompts[i].strip(), shown) for i, shown in zip(index.tolist(), pictures)]
        prompt = processor.rows(named_rows(samples, rows), outputs=True).to(device)
        batch["labels"] = self.class_ids[index].repeat_interleave(len(rows), dim=0)
        return {**vars(prompt), **batch}


class Stopwatch:
    """Seconds by stage, added up until they are taken."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[stage] += self._now() - start

    def take(self) -> dict[str, float]:
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def draw_samples(
    model: InstructionModel,
    processor: Processor,
    records: Sequence[Mapping],
    settings: EditSettings,
    count: int,
    seed: int,
    with_truth: Callable[[str], bool],
    watch: Stopwatch,
) -> Rollout:
    """`count` samples of every prompt of the records, drawn from words alone.

    Args:
        records: `data.pairs.PROMPTS`.
        seed: with a record's key and the number of its prompt it keys the noise, so a record's samples are the same
            whatever else is in the batch and whichever process draws them.
        with_truth: record's key → whether its pictures take the place of the last samples of each prompt: its own
            and, in a pair, its partner's.
    """
    wanted = []  # (words, group, number of the prompt, ground truth pictures by whose they are)
    for group, record in enumerate(records):
        truths = record["images"] if record["images"] and with_truth(record["key"]) else []
        for p, words in enumerate(record["prompts"]):
            own = {OWN: truths[p]} if truths else {}
            partners = {PARTNERS: truths[1 - p]} if len(truths) == 2 else {}
            wanted.append((words, group, p, own | partners))
    for _, group, _, truths in wanted:
        if count <= len(truths):
            raise ValueError(
                f"{records[group]['key']}: num_generations={count} leaves nothing to draw beside {len(truths)} "
                "pictures of ground truth; give 3 or more, or truth_steps: [] for none."
            )
    drawn: dict[int, tuple] = {}
    for size in {count - len(truths) for *_, truths in wanted}:
        places = [i for i, (*_, truths) in enumerate(wanted) if count - len(truths) == size]
        keys = [(_key(seed, records[wanted[i][1]]["key"], wanted[i][2]), k) for i in places for k in range(size)]
        words = [wanted[i][0] for i in places]
        with watch("rollout"):
            found = draw(model, processor, words, settings, samples=keys, keep_logps=True)
        with watch("pictures"):
            pictures = to_pictures(model, found.fed_codes)
        for j, i in enumerate(places):
            mine = slice(j * size, (j + 1) * size)
            drawn[i] = found.class_ids[mine], found.logps[mine], pictures[mine]
    return _with_truth(model, processor, records, wanted, drawn, watch)


def _with_truth(model, processor, records, wanted, drawn, watch: Stopwatch) -> Rollout:
    """What was drawn for each prompt, then its ground truth."""
    ids, logps, pictures, prompts, groups, numbers, names = [], [], [], [], [], [], []
    columns = defaultdict(list)
    for i, (words, group, p, truths) in enumerate(wanted):
        some_ids, some_logps, some_pictures = drawn[i]
        crops = [
            center_crop(load_image(picture, f"{records[group]['key']}: {whose} picture"), processor.image_size)
            for whose, picture in truths.items()
        ]
        if crops:
            with watch("pictures"):
                codes = model.token_model.encode(processor.pixel_values(crops).to(some_ids.device))
            some_ids = torch.cat([some_ids, codes])
            some_logps = torch.cat([some_logps, torch.full(codes.shape, math.nan, device=codes.device)])
        ids.append(some_ids), logps.append(some_logps)
        size = len(some_ids)
        pictures += [*some_pictures, *crops]
        names += [""] * len(some_pictures) + list(truths)
        prompts += [words] * size
        groups += [group] * size
        numbers += [i] * size
        for name, value in records[group].items():
            if name in ("prompts", "images"):
                continue
            each = value[p] if isinstance(value, list) and len(value) == len(records[group]["prompts"]) else value
            columns[name] += [None if each == [] else each] * size
    device = ids[0].device
    groups, numbers = (torch.tensor(each, device=device) for each in (groups, numbers))
    return Rollout(prompts, groups, numbers, torch.cat(ids), pictures, torch.cat(logps), names, dict(columns))


def edit_samples(
    model: InstructionModel,
    processor: Processor,
    records: Sequence[Mapping],
    settings: EditSettings,
    count: int,
    seed: int,
    watch: Stopwatch,
) -> Rollout:
    """`count` edits of every record, each a group; whether a patch is copied is drawn, too (`sample_gate`).

    Args:
        records: photo pairs, `data.sources.FEATURES`, with further columns for the rewards.
    """
    words = [record["instruction"] for record in records]
    sources = [load_photo(record["source"], f"{record['key']}: source") for record in records]
    with watch("rollout"):
        results = Editor(model, processor, settings).edit_many(
            sources, words, num_images=count, seed=[_key(seed, r["key"], 0) for r in records], keep_logps=True
        )
    device, family = model.device, model.token_model
    with watch("pictures"), torch.no_grad():
        squares = [Letterbox(*source.size, processor.image_size).fit(seen(source)) for source in sources]
        pixels = processor.pixel_values(squares).to(device)
        features = None if processor.sees_codes else family.see(pixels)
    owners = torch.arange(len(records), device=device).repeat_interleave(count)
    names = [name for name in records[0] if name not in ("instruction", "target", "mask", "source")]
    columns = {name: [records[i][name] for i in owners.tolist()] for name in names}
    return Rollout(
        prompts=[words[i] for i in owners.tolist()],
        groups=owners,
        prompt_numbers=owners,
        class_ids=torch.stack([result.class_ids for result in results]).to(device),
        pictures=[result.image for result in results],
        logps=torch.stack([result.logps for result in results]).to(device),
        truths=[""] * len(results),
        columns=columns | {"source": [sources[i] for i in owners.tolist()]},
        shown=owners,
        source_tokens=torch.stack([result.source_tokens for result in results[::count]]).to(device),
        features=features,
        transformed=torch.stack([result.transformed for result in results]).to(device),
    )


def judge(rollout: Rollout, rewards: Mapping[str, Callable]) -> None:
    """Fills in the rewards: one call of each function for all samples.

    Raises:
        ValueError: a function returned another number of rewards than there are samples.
    """
    for name, function in rewards.items():
        values = function(prompts=rollout.prompts, completions=rollout.pictures, **rollout.columns)
        if len(values) != len(rollout):
            raise ValueError(
                f"reward {name} returned {len(values)} rewards for {len(rollout)} pictures; expected one for each"
            )
        values = [math.nan if value is None else float(value) for value in values]
        rollout.rewards[name] = torch.tensor(values, device=rollout.class_ids.device)


def _key(seed: int, key: str, prompt: int) -> int:
    """A seed of its own for each prompt of a record."""
    words = np.frombuffer(key.encode().ljust(4 * -(-len(key.encode()) // 4), b"\0"), np.uint32)
    return int(np.random.SeedSequence((seed, prompt, *words.tolist())).generate_state(1, np.uint64)[0] >> 1)
