"""PairComp in small: pairs of captions of the built-in shapes, drawn twice each and judged by the generator itself.

Needs no download: what a caption asks for is a scene, and the generator knows what it looks like. Knows nothing of
files or of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from thinkclearly.data.pairs import KINDS
from thinkclearly.data.shape_score import is_shown
from thinkclearly.data.shapes import Scene
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.evaluation.benchmarks.drawing import draw_numbered
from thinkclearly.evaluation.benchmarks.paircomp import AVERAGE, MEANS, pair_means
from thinkclearly.generation.draw import to_pictures
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor

MODEL, PARTNER, TOKENIZER = "model", "partner", "tokenizer"
DIVERSITY = "diversity"
COLUMNS = {
    **{kind: (f"{kind} ↑", "%") for kind in (*KINDS, AVERAGE)},
    DIVERSITY: ("Between samples, levels", "{:.1f}"),
}


@dataclass(frozen=True)
class ShapePrompt:
    """A caption, the scene it describes, and that of its partner, from which it differs in what `kind` names."""

    kind: str
    text: str
    scene: Scene
    partner: Scene


def shape_prompts(rows: Dataset) -> list[ShapePrompt]:
    """The captions of `data.pairs.shape_pairs`: the two of a pair next to each other."""
    prompts = []
    for key, texts, scenes in zip(rows["key"], rows["prompts"], rows["scene"]):
        first, second = map(Scene.from_json, scenes)
        kind = key.split("[")[0]
        prompts += [ShapePrompt(kind, texts[0], first, second), ShapePrompt(kind, texts[1], second, first)]
    return prompts


def look(
    model: InstructionModel,
    processor: Processor,
    prompts: Sequence[ShapePrompt],
    pictures: Sequence[Sequence[Image.Image]],
) -> list[dict]:
    """Which pictures show their prompt's scene.

    Args:
        pictures: of each prompt, its samples, RGB of one size.

    Returns:
        `list[dict]`: of each prompt lists of bool: `model`, of its samples; `partner`, of the true picture of the
        pair's other scene, which shows how strict the judge is; `tokenizer`, of the true picture coded and decoded,
        the best that a model can draw. And `diversity`: the mean absolute difference of two samples, levels (0 to
        255), or None for one sample.
    """
    side = processor.image_size
    pixels = processor.pixel_values([prompt.scene.render(side) for prompt in prompts]).to(model.device)
    decoded = to_pictures(model, model.token_model.encode(pixels))
    return [
        {
            MODEL: [is_shown(picture, prompt.scene) for picture in samples],
            PARTNER: [is_shown(prompt.partner.render(side), prompt.scene)],
            TOKENIZER: [is_shown(best, prompt.scene)],
            DIVERSITY: _difference(samples),
        }
        for prompt, samples, best in zip(prompts, pictures, decoded)
    ]


def summarise(prompts: Sequence[ShapePrompt], looked: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """ "arithmetic" and "geometric" → row → kind → share of pictures that show their scene.

    As in PairComp: the arithmetic mean of a pair's pictures, and the geometric one, which is 1 where all of them show
    their scene and otherwise 0. A kind is the mean of its pairs, "Average" that of the kinds.
    """
    pairs = [(prompts[i].kind, looked[i], looked[i + 1]) for i in range(0, len(prompts), 2)]
    result: dict[str, dict[str, dict]] = {mean: {} for mean in MEANS}
    for row in (MODEL, PARTNER, TOKENIZER):
        means = pair_means((kind, [*first[row], *second[row]]) for kind, first, second in pairs)
        for mean in MEANS:
            shares = {kind: means[kind][mean] for kind in (*KINDS, AVERAGE) if kind in means}
            result[mean][row] = {"pictures": sum(len(each[row]) for each in looked), **shares}
    differences = [each[DIVERSITY] for each in looked if each[DIVERSITY] is not None]
    result["arithmetic"][MODEL][DIVERSITY] = float(np.mean(differences)) if differences else None
    return result


def measure_pairs(
    model: InstructionModel,
    processor: Processor,
    rows: Dataset,
    settings: DecodeSettings,
    *,
    seed: int = 0,
    num_samples: int = 2,
    batch_size: int = 64,
) -> dict[str, dict[str, dict]]:
    """Draws every caption of `rows` `num_samples` times and sums up, in memory; for experiments. See `summarise`.

    Args:
        rows: see `data.pairs.shape_pairs`.
        seed: with a caption's number it keys the noise.
        batch_size: pictures that are drawn at once.
    """
    prompts, looked = shape_prompts(rows), []
    count = max(1, batch_size // num_samples)
    for start in tqdm(range(0, len(prompts), count), desc="draw", leave=False):
        batch = prompts[start : start + count]
        words = {start + i: prompt.text for i, prompt in enumerate(batch)}
        drawn = to_pictures(model, draw_numbered(model, processor, words, settings, seed, num_samples).fed_codes)
        samples = [drawn[i : i + num_samples] for i in range(0, len(drawn), num_samples)]
        looked += look(model, processor, batch, samples)
    return summarise(prompts, looked)


def _difference(samples: Sequence[Image.Image]) -> float | None:
    arrays = [np.asarray(picture, np.float32) for picture in samples]
    differences = [float(np.abs(a - b).mean()) for a, b in combinations(arrays, 2)]
    return float(np.mean(differences)) if differences else None
