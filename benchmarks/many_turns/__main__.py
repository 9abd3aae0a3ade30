"""How far a picture drifts over many turns, by what each turn is given: `python -m benchmarks.many_turns`.

Chains of held-out shape edits, each on the scene that the one before left. Measured after each turn, against the
*first* picture, where nobody ever asked for a change: outside the union of the true masks so far. Knows how the
numbers are made and drawn, not how an edit is.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import time
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from thinkclearly import load_editor
from thinkclearly.data.shapes import ShapeEdit, edit_scene, packaged_photos, random_scene
from thinkclearly.editing.session import EditSession
from thinkclearly.evaluation.metrics import aggregate_image_metrics, image_metrics
from thinkclearly.evaluation.report import machine
from thinkclearly.files import write_json, write_text
from thinkclearly.hub.pipeline import DEFAULT_MODEL
from thinkclearly.images import Letterbox
from thinkclearly.reporting.pictures import sheet
from thinkclearly.reporting.tables import markdown_table

logger = logging.getLogger("many_turns")

# A new background would leave no pixel that nobody asked to change.
OPERATIONS = ("recolour", "remove", "add", "move", "replace")
# What the next turn is given.
BASELINES = {
    "raw decode": lambda result: result.raw,
    "token composite": lambda result: result.token_composite,
    "copy where tokens match": lambda result: result.copy_matching_tokens(),
}
# Settings of the sessions.
SESSIONS = {"EditSession": {}, "EditSession, prefer: exact": {"prefer": "exact"}}
COLOURS = ("#d1495b", "#d98e04", "#7a5cc0", "#17806d", "#2f6fd0")
SHOWN_TURNS = (1, 2, 4, 6, 8, 10)  # columns of the sheet


def chain(seed: int, number: int, turns: int) -> list[ShapeEdit]:
    """Edits that follow each other, between one and three shapes at any time; the same arguments, the same chain."""
    rng = np.random.default_rng((seed, number))
    scene, edits = random_scene(rng, packaged_photos("test"), shapes=2), []
    for _ in range(turns):
        barred = {1: "remove", 3: "add"}.get(len(scene.shapes))
        edits.append(edit_scene(scene, str(rng.choice([name for name in OPERATIONS if name != barred])), rng))
        scene = edits[-1].after
    return edits


def follow(editor, chains: list[list[ShapeEdit]], size: int, choose, bar):
    """Each turn's pictures of all chains; every turn is given what `choose` takes of the last results."""
    pictures = [edits[0].before.render(size) for edits in chains]
    for turn in zip(*chains):
        pictures = [choose(result) for result in editor.edit_many(pictures, [edit.instruction for edit in turn])]
        bar.update(len(pictures))
        yield pictures


def follow_session(editor, chains: list[list[ShapeEdit]], size: int, settings: dict, bar):
    """The same with one session a chain, which keeps its promise or stops the benchmark."""
    sessions = [EditSession(editor, edits[0].before.render(size)) for edits in chains]
    for turn in zip(*chains):
        for session, edit in zip(sessions, turn):
            session.edit(edit.instruction, **settings)
            kept = ~session.touched
            np.testing.assert_array_equal(np.asarray(session.image)[kept], np.asarray(session.first)[kept])
            bar.update()
        yield [session.image for session in sessions]


def measure(chains: list[list[ShapeEdit]], size: int, box: Letterbox, grid: int, turns) -> list[dict]:
    """For each turn: `outside_masks` and `outside_patches`, metrics over all chains, and the share of edits done.

    A mask cuts through patches, and a patch is copied or painted as a whole. Outside the patches that a mask touches,
    no edit needs to change anything.
    """
    first = [edits[0].before.render(size) for edits in chains]
    masks = np.zeros((len(chains), size, size), bool)
    patches, rows = masks.copy(), []
    for number, pictures in enumerate(turns):
        edits = [edits[number] for edits in chains]
        for i, edit in enumerate(edits):
            mask = edit.render(size)[2]
            masks[i] |= np.asarray(mask) > 0
            patches[i] |= box.unfit_grid(box.fit_mask(mask, grid))
        rows.append(
            {
                "turn": number + 1,
                "outside_masks": compare(pictures, first, masks),
                "outside_patches": compare(pictures, first, patches),
                "done": float(np.mean([edit.is_done(picture) for edit, picture in zip(edits, pictures)])),
            }
        )
    return rows


def compare(pictures, first, regions, draws: int = 2000) -> dict:
    """Metrics outside the regions, pooled over chains, and the median and worst chain's own.

    `psnr_interval` holds the middle 95 % of the pooled PSNR over chains drawn with replacement.
    """
    found = [image_metrics(*compared) for compared in zip(pictures, first, regions)]
    summary = aggregate_image_metrics(found)
    pixels = np.array([row["pixels_outside"] for row in found])
    mse = [row["mse_outside"] for row in found if row["pixels_outside"]]
    squares = pixels * np.array([row["mse_outside"] or 0.0 for row in found])
    drawn = np.random.default_rng(0).integers(len(found), size=(draws, len(found)))
    worst, best = np.quantile(squares[drawn].sum(1) / pixels[drawn].sum(1), (0.975, 0.025))
    return {
        "psnr_pooled": psnr(summary["mse_pooled_outside"]),
        "psnr_interval": [psnr(worst), psnr(best)],
        "mse_pooled": summary["mse_pooled_outside"],
        "mse_median": float(np.median(mse)),
        "mse_worst": max(mse),
        "exact": summary["exact_outside"],
        "max_abs": summary["max_abs_outside"],
        "pixels": summary["pixels_outside"],
    }


def psnr(mse: float) -> float:
    """In dB; infinite for an exact copy."""
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def draw(results: dict) -> str:
    """PSNR and exact pixels over turns, an SVG on white paper, so that it reads on a dark page as well."""
    with rc_context({"svg.hashsalt": "many turns", "font.size": 9}):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        drift, exact = figure.subplots(1, 2)
        for (name, rows), colour in zip(results["methods"].items(), COLOURS):
            turns = [row["turn"] for row in rows]
            style = {"color": colour, "linewidth": 2.4 if name in SESSIONS else 1.5, "marker": "o", "markersize": 3}
            masks, patches = ([row[region] for row in rows] for region in ("outside_masks", "outside_patches"))
            band = zip(*(map(float, row["psnr_interval"]) for row in masks))
            drift.plot(turns, [float(row["psnr_pooled"]) for row in masks], label=name, **style)
            drift.fill_between(turns, *band, color=colour, alpha=0.13, linewidth=0)
            exact.plot(turns, [100 * row["exact"] for row in masks], **style)
            exact.plot(turns, [100 * row["exact"] for row in patches], linestyle="--", **style)
        drift.set_title("PSNR to the first picture, outside the masks, dB", loc="left", fontsize=9)
        exact.set_title("bit-exact there, %; dashed: outside the patches", loc="left", fontsize=9)
        exact.set_ylim(-3, 103)
        for axes in (drift, exact):
            axes.set_xlabel("turn")
            axes.set_xticks(turns)
            axes.grid(alpha=0.2, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*drift.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    return text.getvalue()


def look(edits: list[ShapeEdit], size: int, lines: dict[str, list]) -> Image.Image:
    """A chain as a sheet: what was asked, drawn truly, and what each method made of it."""
    shown = [turn for turn in SHOWN_TURNS if turn <= len(edits)]
    rows = [[(edits[0].before.render(size), "first picture")]]
    rows[0] += [(edits[turn - 1].after.render(size), f"{turn}: {edits[turn - 1].instruction}") for turn in shown]
    for name, pictures in lines.items():
        rows.append([(rows[0][0][0], name), *((pictures[turn - 1], f"turn {turn}") for turn in shown)])
    return sheet(rows, cell=2 * size)


def table(results: dict) -> str:
    """The Markdown table of the docs: the first turn, the middle and the last."""
    shown = sorted({1, math.ceil(results["turns"] / 2), results["turns"]})
    head = ["", *(f"PSNR, turn {n}" for n in shown), *(f"exact, turn {n}" for n in shown)]
    head += [f"exact outside the patches, turn {results['turns']}", "edits done"]
    lines = []
    for name, rows in results["methods"].items():
        found = [rows[n - 1]["outside_masks"] for n in shown]
        drift = [f"{float(row['psnr_pooled']):.1f} dB" for row in found]
        exact = [f"{row['exact']:.1%}" for row in (*found, rows[-1]["outside_patches"])]
        lines.append([name, *drift, *exact, f"{np.mean([row['done'] for row in rows]):.0%}"])
    return markdown_table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_turns", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="Fine-tune: folder or Hub id.")
    parser.add_argument("--chains", type=int, default=24, help="Pictures that go through all turns.")
    parser.add_argument("--turns", type=int, default=10, help="Edits of each picture.")
    parser.add_argument("--size", type=int, default=64, help="Side of the pictures, pixels.")
    parser.add_argument("--seed", type=int, default=2024, help="Of the scenes and instructions.")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/many_turns.svg"), help="And a .png beside it.")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    editor, started, size = load_editor(options.model), time.perf_counter(), options.size
    chains = [chain(options.seed, number, options.turns) for number in range(options.chains)]
    with tqdm(
        total=options.chains * options.turns * (len(BASELINES) + len(SESSIONS)), desc="edit", unit="picture"
    ) as bar:
        made = {name: list(follow(editor, chains, size, choose, bar)) for name, choose in BASELINES.items()}
        for name, settings in SESSIONS.items():
            made[name] = list(follow_session(editor, chains, size, settings, bar))
    box = Letterbox(size, size, editor.processor.image_size)
    methods = {name: measure(chains, size, box, editor.processor.grid, turns) for name, turns in made.items()}
    flags = " ".join(f"--{name} {getattr(options, name)}" for name in ("chains", "turns", "size", "seed"))
    results = {
        "command": "python -m benchmarks.many_turns " + flags,
        "machine": machine(),
        "seconds": round(time.perf_counter() - started, 1),
        "model": Path(options.model).name,
        "chains": options.chains,
        "turns": options.turns,
        "size": options.size,
        "seed": options.seed,
        "methods": methods,
    }
    write_json(options.results, results)
    write_text(options.plot, draw(results))
    shown = next((i for i, edits in enumerate(chains) if edits[0].before.background.photo), 0)
    lines = {name: [pictures[shown] for pictures in made[name]] for name in ("raw decode", *SESSIONS)}
    look(chains[shown], size, lines).quantize(96).save(options.plot.with_suffix(".png"), optimize=True)
    logger.info("%s", table(results))


if __name__ == "__main__":
    main()
