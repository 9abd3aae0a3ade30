"""Runs an editor over a benchmark of the field and measures it: `thinkclearly evaluate --benchmark NAME`.

Edits and measurements are kept item by item, so that the same command goes on where it stopped. What is measured is
`metrics`'s business, how it reads `report`'s.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
from accelerate import PartialState
from datasets import Dataset

from thinkclearly.data.benchmarks import PIE_SIDE, SESSIONS_FILE, decode_mask, magicbrush_turns, pie_bench
from thinkclearly.data.sources import BadRecord, read_example
from thinkclearly.decoding.settings import check_seed
from thinkclearly.editing.batch import ITEMS, TABLE_FILE, edit_items
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.benchmarks import metrics
from thinkclearly.evaluation.benchmarks.drawn import NUM_IMAGES
from thinkclearly.evaluation.benchmarks.results import MEASURED_FILE, Place, measure_each, write_results
from thinkclearly.evaluation.benchmarks.towers import Clip, Dino
from thinkclearly.files import is_local, strict
from thinkclearly.images import MASK_THRESHOLD, ImageError, load_image
from thinkclearly.models.instruction_head import head_digest
from thinkclearly.recipe import check_choice, option

logger = logging.getLogger(__name__)

METHODS = ("raw_model", "pixel_composite")
# What the authors of each benchmark look with.
CLIPS = {"magicbrush": "openai/clip-vit-base-patch32", "pie-bench": "openai/clip-vit-large-patch14"}
DINOS = {"magicbrush": "facebook/dino-vits16", "pie-bench": "facebook/dino-vitb8"}


@dataclass
class BenchmarkArguments:
    """A benchmark of the field, edited and measured."""

    benchmark: str = option("magicbrush", "magicbrush or pie-bench.")
    path: str | None = option(None, "Folder of the unpacked benchmark; magicbrush also: Hub id or Parquet file.")
    split: str = option("dev", "magicbrush: split of a table; the test split is an archive, see docs/evaluation.md.")
    output_dir: str = option("outputs/benchmark", "Where edits, measurements and results go.")
    limit: int | None = option(None, "Only so many sessions or edits, the first ones: for a look, not for a result.")
    batch_size: int = option(8, "Pictures that are edited at once, and items that are measured at once.")
    seed: int = option(0, "Keys all noise.")
    on_bad_record: str = option("error", "error stops at a bad item, skip leaves it out of the means and says so.")
    clip: str | None = option(None, "Hub id or folder; the benchmark's own if not given, none to leave it out.")
    dino: str | None = option(None, "Hub id or folder; the benchmark's own if not given, none to leave it out.")
    lpips: bool = option(False, "pie-bench: LPIPS too; needs torchvision, which fetches SqueezeNet.")

    def __post_init__(self):
        check_choice("benchmark", self.benchmark, (*CLIPS, *NUM_IMAGES))
        check_choice("on_bad_record", self.on_bad_record, ("error", "skip"))
        check_seed(self.seed)
        if self.benchmark == "pie-bench" and self.path is None:
            raise ValueError("pie-bench needs --path: the folder with mapping_file.json and annotation_images")
        for name in ("limit", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 or more")
        self.path = self.path or "osunlp/MagicBrush"
        self.clip, self.dino = self.clip or CLIPS[self.benchmark], self.dino or DINOS[self.benchmark]


@dataclass(frozen=True)
class Case:
    """One thing to be measured: where it counts, its name, our pictures of it, and how the others are had."""

    setting: str
    key: str
    load: Callable[[dict[str, Path]], metrics.Item]
    predictions: dict[str, Path]

    def fingerprint(self) -> str:
        """Of our pictures: those that were edited anew are measured anew."""
        digests = [hashlib.sha256(path.read_bytes()).digest() for path in self.predictions.values()]
        return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def run_benchmark(editor: Editor, arguments: BenchmarkArguments, model: dict, settings: dict) -> dict | None:
    """Edits what is not yet edited, measures what is not yet measured, and writes results.json and results.md.

    Every process of a launch edits its share; the first one measures. A whole benchmark's results are also written to
    `benchmarks/` of the model's folder, where there is one, for its card.

    Args:
        model: what the edits depend on, e.g. `model`, `base` and `dtype`; kept with the results.
        settings: fields of `EditSettings`.

    Returns:
        `dict`: the content of results.json; `None` in other processes than the first.

    Raises:
        BadRecord: an item that cannot be read, with `on_bad_record: error`.
        ValueError: `output_dir` belongs to another run.
    """
    make_cases = {"magicbrush": _magicbrush, "pie-bench": _pie_bench}[arguments.benchmark]
    names = ("benchmark", "path", "split", "seed")
    run = model | {name: getattr(arguments, name) for name in names}
    cases, left_out, split = make_cases(editor, arguments, run, settings)
    if not PartialState().is_main_process:
        return None
    towers = {"clip": arguments.clip, "dino": arguments.dino, "lpips": arguments.lpips}
    # What the edits depend on, as `edit_items` has it, and what the card compares with the files beside it.
    head = head_digest(editor.model.clear_head.weight, editor.model.clear_config)
    run |= editor.fingerprint(**settings) | {"head": head}
    measured = _measure(cases, Path(arguments.output_dir) / MEASURED_FILE, strict(run | towers), arguments)
    left_out += sum((case.setting, case.key) not in measured for case in cases)
    cases = [case for case in cases if (case.setting, case.key) in measured]
    summaries: dict[str, dict[str, dict]] = {}
    for setting in dict.fromkeys(case.setting for case in cases):
        rows = [measured[case.setting, case.key] for case in cases if case.setting == setting]
        summaries[setting] = {name: metrics.summarise([row[name] for row in rows]) for name in rows[0]}
    results = {
        "run": run | {"split": split, "limit": arguments.limit} | towers,
        "left_out": left_out,
        "results": summaries,
    }
    quantized = model.get("load_in_8bit") or model.get("load_in_4bit")
    own = is_local(str(model["model"])) and arguments.limit is None and not (left_out or settings or quantized)
    return write_results(Path(arguments.output_dir), results, Path(model["model"]) if own else None)


def _magicbrush(editor: Editor, arguments: BenchmarkArguments, run: dict, settings: dict):
    """Cases of both settings, as the authors make them: every turn on its own source, and chains of our outputs.

    A session's first turn is the same edit in both. Each method goes on from its own pictures.
    """
    rows = magicbrush_turns(arguments.path, arguments.split)
    sessions: dict[str, list[int]] = {}
    for i, session in enumerate(rows["session"]):
        sessions.setdefault(session, []).append(i)
    sessions = dict(list(sessions.items())[: arguments.limit])
    chosen = [i for turns in sessions.values() for i in turns]
    keys, words = rows["key"][:], rows["instruction"][:]
    edit = partial(_edit, editor, arguments=arguments, run=run, settings=settings)

    items = rows.select(chosen).rename_column("source", "image").select_columns(list(ITEMS))
    single = edit(items, "single-turn")
    cases = [
        Case("single-turn", keys[i], partial(_turns, rows, [i]), single[keys[i]]) for i in chosen if keys[i] in single
    ]
    reached = {}  # method → session → picture after the turns so far
    for method in METHODS:
        last = {s: single[keys[turns[0]]][method] for s, turns in sessions.items() if keys[turns[0]] in single}
        for number in range(1, max(map(len, sessions.values()))):
            due = {s: turns[number] for s, turns in sessions.items() if s in last and len(turns) > number}
            if not due:
                continue
            items = {
                "key": [keys[i] for i in due.values()],
                "instruction": [words[i] for i in due.values()],
                "image": [{"path": str(last[s]), "bytes": None} for s in due],
            }
            made = edit(Dataset.from_dict(items, features=ITEMS), f"multi-turn/{method}/turn-{number + 1}")
            for session, i in due.items():
                last.pop(session)
                if keys[i] in made:
                    last[session] = made[keys[i]][method]
        reached[method] = last
    for session, turns in sessions.items():
        if all(session in reached[method] for method in METHODS):
            predictions = {method: reached[method][session] for method in METHODS}
            cases.append(Case("multi-turn", session, partial(_turns, rows, turns), predictions))
    archive = (Path(arguments.path) / SESSIONS_FILE).is_file()
    split = Path(arguments.path).absolute().name if archive else arguments.split
    return cases, len(chosen) + len(sessions) - len(cases), split


def _turns(rows: Dataset, numbers: list[int], predictions: dict[str, Path]) -> metrics.Item:
    """From the source of the first turn to the target of the last; the mask is the union of theirs."""
    turns = [read_example(rows[i]) for i in numbers]
    mask = None
    if len({turn.mask and turn.mask.size for turn in turns}) == 1 and turns[0].mask is not None:
        mask = np.any([np.asarray(turn.mask) > MASK_THRESHOLD for turn in turns], axis=0)
    pictures = {method: load_image(path) for method, path in predictions.items()}
    return metrics.Item(pictures, turns[0].source, rows[numbers[-1]]["caption"], turns[-1].target, mask)


def _pie_bench(editor: Editor, arguments: BenchmarkArguments, run: dict, settings: dict):
    rows = pie_bench(arguments.path)
    rows = rows.select(range(min(len(rows), arguments.limit or len(rows))))
    made = _edit(editor, rows, "edits", arguments=arguments, run=run, settings=settings)
    cases = [
        Case("background", key, partial(_pie_item, rows, i), made[key])
        for i, key in enumerate(rows["key"])
        if key in made
    ]
    return cases, len(rows) - len(cases), "all"


def _pie_item(rows: Dataset, i: int, predictions: dict[str, Path]) -> metrics.Item:
    row = rows[i]
    source = load_image(row["image"], row["key"])
    if source.size != (PIE_SIDE, PIE_SIDE):
        raise BadRecord(f"{row['key']}: {source.width}x{source.height}, but PIE-Bench's masks are for 512x512.")
    pictures = {method: load_image(path) for method, path in predictions.items()}
    return metrics.Item(pictures, source, row["caption"], mask=decode_mask(row["mask_runs"]))


def _edit(
    editor: Editor, items: Dataset, name: str, *, arguments: BenchmarkArguments, run: dict, settings: dict
) -> dict[str, dict[str, Path]]:
    """Key → method → picture, for what could be edited."""
    folder = Path(arguments.output_dir) / name
    options = {"batch_size": arguments.batch_size, "seed": arguments.seed, "on_bad_record": arguments.on_bad_record}
    edit_items(editor, items, folder, run=run, **options, **settings)
    table = pyarrow.parquet.read_table(folder / TABLE_FILE, columns=["key", *METHODS])
    return {row["key"]: {method: folder / row[method] for method in METHODS} for row in table.to_pylist()}


def _measure(cases: list[Case], path: Path, header: dict, arguments: BenchmarkArguments) -> dict[Place, dict]:
    """(setting, key) → row → column → number, for what could be read."""
    known = {(case.setting, case.key): case for case in cases}

    def instrument():
        measure = _instrument(arguments)

        def batch(places):
            items = {place: item for place in places if (item := _load(known[place], arguments)) is not None}
            return dict(zip(items, measure(list(items.values())))) if items else {}

        return batch

    return measure_each(
        path, header, {p: case.fingerprint() for p, case in known.items()}, instrument, arguments.batch_size
    )


def _load(case: Case, arguments: BenchmarkArguments) -> metrics.Item | None:
    try:
        return case.load(case.predictions)
    except (BadRecord, ImageError) as error:
        if arguments.on_bad_record == "error":
            raise
        logger.warning("%s is left out: %s", case.key, error)
        return None


def _instrument(arguments: BenchmarkArguments) -> Callable[[list[metrics.Item]], list[dict]]:
    device = PartialState().device
    towers = {
        name: None if (where := getattr(arguments, name)) == "none" else tower(where, device)
        for name, tower in (("clip", Clip), ("dino", Dino))
    }
    if arguments.benchmark == "magicbrush":
        return partial(metrics.magicbrush, **towers)
    lpips = None
    if arguments.lpips:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # imports torchvision

        network = LearnedPerceptualImagePatchSimilarity(net_type="squeeze").to(device)

        def lpips(prediction, reference):
            return network(prediction.to(device), reference.to(device))

    return partial(metrics.pie_bench, **towers, lpips=lpips)
