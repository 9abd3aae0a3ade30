"""How fast pairs become tokens, against the original's loop: `python -m benchmarks.preparation`.

Both start from the same folder of photographs and end with tokens and labels on disk; what is timed is all between.
Writes preparation.json and preparation.md. Knows how the runs are made and compared, not how a picture is encoded.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from thinkclearly.bench.measure import interleaved, now
from thinkclearly.bench.scripted import SIZES, SMALL_TOWERS, random_model
from thinkclearly.data import sources
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.evaluation.report import machine
from thinkclearly.files import write_json, write_text
from thinkclearly.images import Letterbox, load_image
from thinkclearly.models.load import Checkpoint, load_checkpoint
from thinkclearly.reporting.tables import markdown_table

SEED = 12  # of the built-in edits
PHOTO = (1024, 768)
ORIGINAL = "the original's loop"
TITLES = {
    "tiny": "The tiny model, 64 pixels",
    "full": "Janus's VQ model at full size, 384 pixels, random weights",
}
# What a run's time is reported as, by file and name of the functions that it goes to.
STAGES = {
    "read": [("sources.py", "read_example")],
    "square": [("images.py", "fit")],
    "compare": [("images.py", "patch_difference")],
    "encode": [("model.py", "encode"), ("~", "<method 'cpu' of 'torch._C.TensorBase' objects>")],
    "write": [("arrow_dataset.py", "save_to_disk")],
    "label": [("prepare.py", "label_dataset")],
}


@dataclass
class Run:
    """One way through all pairs: what it took, and the codes (pairs, 2, N) of sources and targets."""

    seconds: float
    tokens: np.ndarray


def write_photographs(folder: Path, pairs: int) -> None:
    """Built-in edits over photographs, as JPEG in the layout that `sources.folder` reads."""
    for number in range(pairs):
        edit = random_edit(SEED, number, packaged_photos("train"))
        sample = folder / f"sample_{number:04d}"
        sample.mkdir()
        for side, picture in zip(("source", "target"), edit.render(*PHOTO)):
            picture.save(sample / f"{side}.jpg", quality=92)
        metadata = {"instruction": edit.instruction, "source": "source.jpg", "target": "target.jpg"}
        (sample / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")


def original(folder: Path, checkpoint: Checkpoint, output: Path) -> np.ndarray:
    """ThinkClearly's 2_prepare_data.py: a picture at a time, equal tokens are CLEAR, a line of JSON for each pair.

    Two things are ours, so that its codes can be compared: pictures keep their proportions, and float32.
    """
    device, size = checkpoint.network.model.vqmodel.device, checkpoint.processor.image_size
    found = []
    with (output / "prepared.jsonl").open("w", encoding="utf-8") as file:
        for sample in sorted(folder.iterdir()):
            metadata = json.loads((sample / "metadata.json").read_text(encoding="utf-8"))
            pair = []
            for side in ("source", "target"):
                picture = load_image(sample / metadata[side])
                square = Letterbox(*picture.size, size).fit(picture)
                pixels = checkpoint.processor.pixel_values([square]).to(device)
                pair.append(checkpoint.token_model.encode(pixels)[0].tolist())
            labels = ["<CLEAR>" if a == b else b for a, b in zip(*pair)]
            record = {"instruction": metadata["instruction"], "input_tokens": pair[0], "output_tokens": labels}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            found.append(pair)
    return np.array(found)


def ours(folder: Path, checkpoint: Checkpoint, output: Path, batch_size: int, workers: int) -> np.ndarray:
    prepared = prepare_dataset(sources.folder(folder), checkpoint, output, batch_size=batch_size, workers=workers)
    return np.stack([prepared["input_tokens"][:], prepared["target_tokens"][:]], axis=1)


def case(name: str, pairs: int, arguments: argparse.Namespace) -> dict:
    """All rows of one model; every batch size and number of workers that makes a difference for so few pairs."""
    device = torch.device(arguments.device)
    if name == "tiny":
        checkpoint = load_checkpoint("tiny", device=device)
    else:
        model, processor = random_model(SIZES["mid"], towers=(SMALL_TOWERS[0], {}), device=device)
        checkpoint = Checkpoint(model.base, processor)
    options = {}
    for size in sorted({min(size, pairs) for size in arguments.batches}):
        batches = -(-pairs // size)
        for workers in sorted({min(workers, batches - 1) for workers in arguments.workers}):
            options[f"ours, batch {size}, workers {workers}"] = {"batch_size": size, "workers": workers}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), pairs)

        def row(function: Callable, **options) -> Callable[[], Run]:
            def run() -> Run:
                # The inner bars would run through the outer one.
                with tempfile.TemporaryDirectory() as output, open(os.devnull, "w") as quiet, redirect_stderr(quiet):
                    start = now(device)
                    tokens = function(Path(folder), checkpoint, Path(output), **options)
                    return Run(now(device) - start, tokens)

            return run

        rows = {ORIGINAL: row(original)} | {text: row(ours, **given) for text, given in options.items()}
        rounds = arguments.rounds + (name == "tiny")
        with tqdm(total=rounds * len(rows), desc=name, unit="run") as bar:
            # A run of the full size takes so long that what is cold at first does not show.
            runs = interleaved(rows, arguments.rounds, bar.update, warm_up=name == "tiny")
        single = [text for text, given in options.items() if not given["workers"]][-1]
        return {
            "pairs": pairs,
            "rows": table(runs, 2 * pairs),
            "profile": {"row": single, "stages": where_time_goes(rows[single])},
        }


def table(runs: dict[str, list[Run]], pictures: int) -> dict[str, dict]:
    """Per row the seconds of its rounds, pictures a second, speed against the original's loop, codes unlike its."""
    base = runs[ORIGINAL]
    rows = {}
    for name, row in runs.items():
        ratios = [one.seconds / run.seconds for one, run in zip(base, row)]
        seconds = [run.seconds for run in row]
        rows[name] = {
            "seconds": seconds,
            "pictures_per_second": pictures / median(seconds),
            "ratio": [median(ratios), min(ratios), max(ratios)],
            "tokens_changed": max(int((run.tokens != base[0].tokens).sum()) for run in row),
            "tokens": base[0].tokens.size,
        }
    return rows


def where_time_goes(run: Callable[[], Run]) -> dict[str, float]:
    """Share of each stage in one run that does all by itself; "other" is the rest."""
    profile = cProfile.Profile()
    seconds = profile.runcall(run).seconds
    spent = {(Path(file).name, name): entry[3] for (file, _, name), entry in pstats.Stats(profile).stats.items()}
    shares = {stage: sum(spent.get(key, 0.0) for key in keys) / seconds for stage, keys in STAGES.items()}
    return shares | {"other": 1 - sum(shares.values())}


def render(results: dict) -> str:
    setup = results["setup"]
    blocks = [
        "# Preparation, measured",
        f"{setup['machine']}; torch {setup['torch']}, transformers {setup['transformers']}, float32; written by "
        f"`{setup['command']}`. How to read it: docs/performance.md.",
        f"From a folder of JPEGs of {PHOTO[0]}×{PHOTO[1]} pixels to tokens and labels on disk. Speed is against "
        f"{ORIGINAL} of the same round: median, and least to most; rounds: {setup['rounds']}.",
    ]
    for name, found in results["models"].items():
        body = []
        for text, row in found["rows"].items():
            middle, least, most = row["ratio"]
            changed = f"{row['tokens_changed']} of {row['tokens']}"
            speed = f"{middle:.2f} × ({least:.2f}–{most:.2f})"
            body.append([text, f"{row['pictures_per_second']:.2f}", speed, changed])
        shares = ", ".join(f"{stage} {share:.1%}" for stage, share in found["profile"]["stages"].items())
        profile = f"Where the time goes ({found['profile']['row']}): {shares}."
        table = markdown_table(["", "pictures a second", "speed", "codes changed"], body)
        blocks += [f"## {TITLES[name]}", f"{2 * found['pairs']} pictures.", table, profile]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.preparation", description=__doc__)
    parser.add_argument("--models", choices=TITLES, nargs="+", default=list(TITLES), help="Those to run; all.")
    parser.add_argument("--pairs", type=int, nargs="+", default=[48, 2], help="Of pictures, for each of the models.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="Batch sizes, in pairs.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="Numbers of workers.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds that count.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="Where the two files go.")
    arguments = parser.parse_args()
    if len(arguments.pairs) != len(arguments.models):
        parser.error(
            f"--pairs: found {len(arguments.pairs)} numbers for {len(arguments.models)} models; give one each"
        )
    changed = {
        name: value
        for name, value in vars(arguments).items()
        if name != "output_dir" and value != parser.get_default(name)
    }
    flags = [f"--{name} {' '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in changed.items()]
    results = {
        "setup": {
            "machine": machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rounds": arguments.rounds,
            "command": " ".join(["python -m benchmarks.preparation", *flags]),
        },
        "models": {name: case(name, pairs, arguments) for name, pairs in zip(arguments.models, arguments.pairs)},
    }
    write_json(arguments.output_dir / "preparation.json", results)
    write_text(arguments.output_dir / "preparation.md", render(results))


if __name__ == "__main__":
    main()
