"""Runs a model over a benchmark of drawing and measures it: `thinkclearly evaluate --benchmark NAME`.

Pictures and measurements are kept one by one, so that the same command goes on where it stopped. What is measured is
the business of each benchmark's own module, how it reads `report`'s.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from thinkclearly.data.pairs import shape_pairs
from thinkclearly.decoding.settings import check_seed
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.think import thinking_fingerprint
from thinkclearly.evaluation.benchmarks import geneval, paircomp, shapes_pairs
from thinkclearly.evaluation.benchmarks.detector import ColourNamer, Detector
from thinkclearly.evaluation.benchmarks.drawing import Prompt, draw_prompts
from thinkclearly.evaluation.benchmarks.results import MEASURED_FILE, measure_each, write_results
from thinkclearly.evaluation.benchmarks.shapes_pairs import MODEL
from thinkclearly.evaluation.benchmarks.thinking import FIRST, LAST, think_ends
from thinkclearly.evaluation.benchmarks.towers import Clip
from thinkclearly.evaluation.benchmarks.vqa import QUESTION, VqaScorer
from thinkclearly.files import is_local, strict, write_json, write_text
from thinkclearly.images import load_image
from thinkclearly.models.instruction_head import HEAD_FILE, head_digest
from thinkclearly.recipe import check_choice, option

logger = logging.getLogger(__name__)

PICTURES, SCORES_FILE = "pictures", "scores.json"
# benchmark → pictures a prompt, as its authors have it
NUM_IMAGES = {"paircomp": 2, "geneval": 4, "shapes-pairs": 2}
# options that name what looks at the pictures
JUDGES = {"paircomp": ("scorer",), "geneval": ("detector", "clip"), "shapes-pairs": ()}
FILES = {"paircomp": "PairComp.json", "geneval": "evaluation_metadata.jsonl"}
SHAPE_PAIRS = 300


@dataclass
class DrawnArguments:
    """A benchmark of drawing: pictures from prompts, measured."""

    benchmark: str = option("paircomp", f"{', '.join(NUM_IMAGES)}.")
    path: str | None = option(None, "paircomp: its PairComp.json; geneval: its evaluation_metadata.jsonl.")
    output_dir: str = option("outputs/benchmark", "Where pictures, measurements and results go.")
    limit: int | None = option(None, "Only so many pairs or prompts, the first ones: for a look, not for a result.")
    num_images: int | None = option(None, "Pictures of each prompt; as many as the authors draw if not given.")
    batch_size: int = option(8, "Pictures that are drawn at once, and scored at once.")
    seed: int = option(0, "Keys all noise.")
    scorer: str = option("OpenGVLab/InternVL3-8B-hf", "paircomp: Hub id or folder of a model that is asked.")
    detector: str = option(
        "facebook/mask2former-swin-small-coco-instance", "geneval: Hub id or folder of what finds COCO's objects."
    )
    clip: str = option("openai/clip-vit-large-patch14", "geneval: Hub id or folder of what names their colours.")

    def __post_init__(self):
        check_choice("benchmark", self.benchmark, tuple(NUM_IMAGES))
        check_seed(self.seed)
        if self.benchmark in FILES and self.path is None:
            raise ValueError(f"{self.benchmark} needs --path: its {FILES[self.benchmark]}")
        self.num_images = NUM_IMAGES[self.benchmark] if self.num_images is None else self.num_images
        for name in ("limit", "num_images", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 or more")


@dataclass(frozen=True)
class Task:
    """What is drawn, how the pictures of a prompt are looked at, and what follows from all of them.

    Attributes:
        instrument: makes the function that looks at a batch: (number, pictures) of prompts → a dict each.
        summarise: these dicts, in the order of `prompts`, and the pictures' folder → setting → row → column → number.
        notes: sentences for the report.
    """

    prompts: list[Prompt]
    instrument: Callable[[], Callable[[Sequence[tuple[int, list[Image.Image]]]], list[dict]]]
    summarise: Callable[[list[dict], Path], dict[str, dict[str, dict]]]
    notes: list[str]


def run_drawn(editor: Editor, arguments: DrawnArguments, model: dict, settings: dict | ThoughtSettings) -> dict | None:
    """Draws what is not yet drawn, measures what is not yet measured, and writes results.json and results.md.

    Every process of a launch draws its share; the first one measures. A whole benchmark's results, drawn with the
    fine-tune's own settings, are also written to `benchmarks/` of its folder, for its card. Where the model thinks,
    the first and the last picture of each thought are rows of their own.

    Args:
        model: what the pictures depend on, e.g. `model`, `base` and `dtype`; kept with the results.
        settings: fields of `EditSettings`; or how to think, instead of drawing at once.

    Returns:
        `dict`: the content of results.json; `None` in other processes than the first.

    Raises:
        BadRecord: a prompt file of another form.
        ValueError: `output_dir` belongs to another run.
    """
    make_task = {"paircomp": _paircomp, "geneval": _geneval, "shapes-pairs": _shapes_pairs}[arguments.benchmark]
    task = make_task(arguments, editor)
    run = model | {name: getattr(arguments, name) for name in ("benchmark", "path", "seed", "num_images")}
    folder = Path(arguments.output_dir)
    make = _think if isinstance(settings, ThoughtSettings) else _draw
    made = make(editor, task.prompts, folder, settings, run, arguments)
    if not PartialState().is_main_process:
        return None
    head = head_digest(editor.model.clear_head.weight, editor.model.clear_config)
    judges = {name: getattr(arguments, name) for name in JUDGES[arguments.benchmark]}
    run |= made.fingerprint | {"head": head} | judges
    results = {
        "run": run | {"split": "all", "limit": arguments.limit},
        "left_out": 0,
        "notes": [*made.notes, *task.notes],
        "results": _results(task, made.rows, folder, run, arguments),
    }
    own = made.by_default and arguments.limit is None and arguments.num_images == NUM_IMAGES[arguments.benchmark]
    own &= not (model.get("load_in_8bit") or model.get("load_in_4bit"))
    own &= is_local(str(model["model"])) and (Path(model["model"]) / HEAD_FILE).is_file()
    return write_results(folder, results, Path(model["model"]) if own else None)


@dataclass(frozen=True)
class _Made:
    """Pictures by row of the table, the name of their folder; and what they come from.

    Attributes:
        by_default: whether the model draws so unless it is told otherwise.
    """

    rows: dict[str, str]
    fingerprint: dict
    notes: list[str]
    by_default: bool


def _draw(editor: Editor, prompts, folder: Path, settings: dict, run: dict, arguments: DrawnArguments) -> _Made:
    effective = replace(editor.settings, **settings)
    options = {"batch_size": arguments.batch_size, "seed": arguments.seed, **settings}
    draw_prompts(editor, prompts, folder / PICTURES, run=run, **options)
    notes, by_default = [_how(effective, arguments)], effective == editor.settings
    return _Made({MODEL: PICTURES}, editor.fingerprint(**settings), notes, by_default)


def _think(
    editor: Editor, prompts, folder: Path, settings: ThoughtSettings, run: dict, arguments: DrawnArguments
) -> _Made:
    options = {"batch_size": arguments.batch_size, "seed": arguments.seed}
    without = think_ends(editor, prompts, folder, settings, run=run, **options)
    notes = [
        f"{arguments.num_images} thoughts a prompt, seed {arguments.seed}: mode {settings.mode}, preset "
        f"{settings.preset}, second {settings.second}, temperature {settings.picture_temperature:g}, top_k "
        f"{settings.picture_top_k or 'all'} (words: {settings.temperature:g}, {settings.top_k or 'all'})."
    ]
    if without:
        notes.append(f"{without} thoughts ended without a picture and count as black ones.")
    return _Made({FIRST: FIRST, LAST: LAST}, thinking_fingerprint(editor, settings), notes, by_default=False)


def _how(settings, arguments: DrawnArguments) -> str:
    """The sampling in one line: what others need to draw the same."""
    if settings.temperature == 0 and arguments.num_images > 1:
        logger.warning("temperature 0: all pictures of a prompt are the same; --temperature 1 draws different ones")
    guidance = f"guidance {settings.cfg_weight:g}" if settings.use_cfg else "no guidance"
    return (
        f"{arguments.num_images} pictures a prompt, seed {arguments.seed}, {guidance}, temperature "
        f"{settings.temperature:g}, top_k {settings.top_k or 'all'}, top_p {settings.top_p:g}."
    )


def _results(
    task: Task, rows: dict[str, str], folder: Path, run: dict, arguments: DrawnArguments
) -> dict[str, dict[str, dict]]:
    """Setting → row → column → number: where pictures are several rows, one table of them all."""
    results: dict[str, dict[str, dict]] = {}
    for row, measured in _measure(task, rows, folder, run, arguments).items():
        for setting, found in task.summarise(measured, folder / rows[row]).items():
            table = results.setdefault(setting, {})
            results[setting] = {name: table[name] for name in table if name in rows} | {row: found.pop(MODEL)} | found
    return results


def _measure(
    task: Task, rows: dict[str, str], folder: Path, run: dict, arguments: DrawnArguments
) -> dict[str, list[dict]]:
    """Row → what was seen of each prompt."""
    places = {(name, str(number)): number for name in rows.values() for number in range(len(task.prompts))}
    files = {
        (name, key): [folder / name / file for file in task.prompts[number].files]
        for (name, key), number in places.items()
    }

    def instrument():
        look = task.instrument()

        def batch(keys):
            shown = [(places[key], [load_image(path) for path in files[key]]) for key in keys]
            return dict(zip(keys, look(shown)))

        return batch

    fingerprints = {place: _digest([path.read_bytes() for path in paths]) for place, paths in files.items()}
    header = strict(run) | ({} if arguments.path is None else {"data": _digest([Path(arguments.path).read_bytes()])})
    count = max(1, arguments.batch_size // arguments.num_images)
    measured = measure_each(folder / MEASURED_FILE, header, fingerprints, instrument, count)
    return {row: [measured[place] for place in places if place[0] == name] for row, name in rows.items()}


def _digest(contents: list[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()[:16]


def _pairs(captions: list[str], num_images: int) -> list[Prompt]:
    """Captions of pairs, the two of a pair next to each other, with PairComp's names of their pictures."""
    return [
        Prompt(text, tuple(f"{i // 2}_{i % 2}_{k}.png" for k in range(num_images))) for i, text in enumerate(captions)
    ]


def _paircomp(arguments: DrawnArguments, editor: Editor) -> Task:
    pairs = paircomp.read_pairs(arguments.path)[: arguments.limit]
    captions = [caption for pair in pairs for caption in pair.captions]
    prompts = _pairs(captions, arguments.num_images)

    def instrument():
        # The benchmark's question has no final period; the reward's has.
        question = QUESTION.removesuffix(".")
        scorer = VqaScorer(arguments.scorer, PartialState().device, batch_size=arguments.batch_size, question=question)

        def look(batch):
            flat = [(captions[number], picture) for number, pictures in batch for picture in pictures]
            scores = iter(scorer.score([text for text, _ in flat], [picture for _, picture in flat]))
            return [{"scores": [next(scores) for _ in pictures]} for _, pictures in batch]

        return look

    def summarise(rows, folder):
        scores = [[row["scores"] for row in rows[2 * pair : 2 * pair + 2]] for pair in range(len(pairs))]
        write_json(folder / SCORES_FILE, paircomp.scores_file(scores))
        means = paircomp.summarise(pairs, {pair: [*first, *second] for pair, (first, second) in enumerate(scores)})
        pictures = {"pictures": len(prompts) * arguments.num_images}
        return {
            f"{kind} mean": {MODEL: pictures | {name: 100 * mean[kind] for name, mean in means.items()}}
            for kind in paircomp.MEANS
        }

    notes = [f"Scored by {arguments.scorer}; the published rows were scored by {paircomp.JUDGE}."]
    return Task(prompts, instrument, summarise, notes)


def _geneval(arguments: DrawnArguments, editor: Editor) -> Task:
    items = geneval.read_items(arguments.path)[: arguments.limit]
    prompts = [
        Prompt(item.prompt, tuple(f"{i:05d}/samples/{k:04d}.png" for k in range(arguments.num_images)))
        for i, item in enumerate(items)
    ]

    def instrument():
        device = PartialState().device
        detector, colours = Detector(arguments.detector, device), ColourNamer(Clip(arguments.clip, device))

        def look(batch):
            found = iter(detector([picture for _, pictures in batch for picture in pictures]))
            return [
                {
                    "wrong": [
                        geneval.judge(items[number], next(found), partial(colours, picture)) for picture in pictures
                    ]
                }
                for number, pictures in batch
            ]

        return look

    def summarise(rows, folder):
        for i, item in enumerate(items):  # for the authors' own evaluator, which reads such a folder
            write_text(folder / f"{i:05d}" / "metadata.jsonl", item.line + "\n")
        judged = [(item.tag, [not reason for reason in row["wrong"]]) for item, row in zip(items, rows)]
        count = {"pictures": len(items) * arguments.num_images}
        return {setting: {MODEL: count | shares} for setting, shares in geneval.summarise(judged).items()}

    notes = [
        f"Objects are found by {arguments.detector}, not by the authors' weights (mmdet's Mask2Former Swin-S), and "
        f"colours named by {arguments.clip} (theirs: ViT-L/14 of open_clip): numbers need not match published ones. "
        "*Images* is what is published; *prompts* counts a prompt as soon as one of its pictures is correct."
    ]
    return Task(prompts, instrument, summarise, notes)


def _shapes_pairs(arguments: DrawnArguments, editor: Editor) -> Task:
    prompts = shapes_pairs.shape_prompts(shape_pairs(arguments.limit or SHAPE_PAIRS, "test", size=8))

    def look(batch):
        shown, pictures = [prompts[number] for number, _ in batch], [pictures for _, pictures in batch]
        return shapes_pairs.look(editor.model, editor.processor, shown, pictures)

    def summarise(rows, _):
        return {f"{kind} mean": found for kind, found in shapes_pairs.summarise(prompts, rows).items()}

    notes = ["Judged by the generator of the shapes: a picture shows all of its scene or it does not."]
    return Task(_pairs([prompt.text for prompt in prompts], arguments.num_images), lambda: look, summarise, notes)
