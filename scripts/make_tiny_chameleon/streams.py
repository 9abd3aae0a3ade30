"""What the tiny Chameleon is trained on, as token ids: drawings, critiques, sub-goals and captions.

Every position also says how much its token counts, and what its patch shows. Knows nothing of the network.
"""

from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from autoencoder import codes_of
from data import IMAGE_SIZE, TOKENS, patch_contents
from tokenizer import QUESTION
from transformers import AutoTokenizer

from thinkclearly.data.shapes import Scene
from thinkclearly.data.thoughts import critique, direct, subgoals
from thinkclearly.models.chameleon.processor import TEMPLATES, ChameleonProcessor

WORD, OBJECT, GROUND = 3.0, 3.0, 1.0  # how much tokens count: words, patches with an object, the others
NOWHERE = -100


@dataclass
class Stream:
    """One stream of T tokens.

    Attributes:
        ids: int16 (T,).
        weights: float16 (T,), how much predicting this token counts; 0 for what is only read.
        contents: int16 (T, 3), patch, shape and colour of a picture's code as `patch_contents` has them, else NOWHERE.
    """

    ids: np.ndarray
    weights: np.ndarray
    contents: np.ndarray


class Writer:
    """Lays thoughts out as streams."""

    def __init__(self, processor: ChameleonProcessor, codes_file: Path):
        *projection, codebook = torch.load(codes_file)
        self.processor, self.projection, self.codebook = processor, tuple(projection), codebook
        self.pictures: list[np.ndarray] = []

    def words(self, text: str, weight: float) -> list[tuple]:
        return [(i, weight, (NOWHERE,) * 3) for i in self.processor.encode_words(text, bos=False)]

    def token(self, index: int, weight: float) -> tuple:
        return index, weight, (NOWHERE,) * 3

    def picture(self, scene: Scene, counts: bool) -> list[tuple]:
        """Its codes are to be filled in by `finished`: -1 stands for the first patch of all pictures, and so on."""
        contents, first = patch_contents(scene), len(self.pictures) * TOKENS
        self.pictures.append(np.asarray(scene.render(IMAGE_SIZE)))
        weights = counts * np.where(contents[:, 0] > 0, OBJECT, GROUND)
        patches = [(-1 - first - n, w, (n, *c)) for n, (w, c) in enumerate(zip(weights, contents.tolist()))]
        boi, eoi = self.processor.boi_id, self.processor.eoi_id
        return [self.token(boi, 1.0), *patches, self.token(eoi, 1.0 * counts)]

    def finished(self, streams: list[list[tuple]]) -> list[Stream]:
        """All streams with their pictures' codes."""
        codes = codes_of(np.stack(self.pictures), self.projection, self.codebook).flatten()
        known = np.array(self.processor.code_ids)[codes.numpy()]
        result = []
        for rows in streams:
            ids, weights, contents = (np.array(column) for column in zip(*rows))
            ids = np.where(ids < 0, known[np.maximum(-1 - ids, 0)], ids)
            result.append(Stream(ids.astype(np.int16), weights.astype(np.float16), contents.astype(np.int16)))
        return result

    def response(self, parts, wanted: Scene) -> list[tuple]:
        """Words and pictures; a first picture with a mistake is read, but not to be drawn."""
        single = all(isinstance(part, Scene) for part in parts)
        rows = []
        for number, part in enumerate(parts):
            if isinstance(part, str):
                rows += self.words(part, WORD)
            else:  # sub-goals begin with words, and all their pictures are right
                rows += self.picture(part, single or number > 0 or part == wanted)
        return rows

    def drawing(self, number: int, rng: np.random.Generator) -> list[tuple]:
        thought, p = direct(21, number), self.processor
        drawn, kind = self.response(thought.parts, thought.scenes[-1]), rng.random()
        if kind < 0.10:  # the unconditional row
            return drawn
        if kind < 0.25:  # the row of the raw prompt
            return self.words(thought.prompt, 0.0) + drawn
        mode = "critique" if kind < 0.35 else "general"
        end = [] if mode == "critique" else [self.token(p.eos_id, 1.0)]
        return self.prompt(mode, thought.prompt, rng) + drawn + end

    def thought(self, mode: str, number: int, rng: np.random.Generator) -> list[tuple]:
        thought = critique(22, number) if mode == "critique" else subgoals(23, number)
        rows = self.response(thought.parts, thought.scenes[-1]) + [self.token(self.processor.eos_id, 1.0)]
        if rng.random() < 0.08:  # the row of pictures alone
            bos = [self.token(self.processor.bos_id, 0.0)] * int(rng.random() < 0.5)
            kept = {self.processor.boi_id, self.processor.eoi_id}
            return bos + [row for row in rows if row[0] < 0 or row[0] in kept]
        return self.prompt(mode, thought.prompt, rng) + rows

    def caption(self, number: int, rng: np.random.Generator) -> list[tuple]:
        thought, p = critique(24, number, wrong=0.3), self.processor
        scene = thought.scenes[0]
        read = [(i, 0.0, contents) for i, _, contents in self.picture(scene, True)]
        asked = self.words(QUESTION, 0.0) + [self.token(p.sep_id, 0.0)]
        return [
            self.token(p.bos_id, 0.0),
            *read,
            *asked,
            *self.words(scene.caption(), WORD),
            self.token(p.eos_id, 1.0),
        ]

    def prompt(self, mode: str, prompt: str, rng: np.random.Generator) -> list[tuple]:
        """With BOS or, as the original draws, without."""
        bos = [self.token(self.processor.bos_id, 0.0)] * int(rng.random() < 0.7)
        return bos + self.words(TEMPLATES[mode].format(p=prompt), 0.0) + [self.token(self.processor.sep_id, 0.0)]


KINDS = {
    "drawing": Writer.drawing,
    "critique": lambda writer, number, rng: writer.thought("critique", number, rng),
    "subgoals": lambda writer, number, rng: writer.thought("subgoals", number, rng),
    "caption": Writer.caption,
}


def write(kind: str, numbers: range, directory: Path) -> list[Stream]:
    torch.set_num_threads(1)
    processor = ChameleonProcessor(AutoTokenizer.from_pretrained(directory / "tokenizer"), IMAGE_SIZE, TOKENS)
    writer = Writer(processor, directory / "codes.pt")
    return writer.finished([KINDS[kind](writer, number, np.random.default_rng((25, number))) for number in numbers])


def pools(counts: dict[str, int], directory: Path, part: int = 500) -> dict[str, list[Stream]]:
    """Streams by kind, by rising length, made by two processes and kept in a file."""
    file = directory / "streams.pt"
    if not file.exists():
        jobs = [(k, range(i, min(i + part, n)), directory) for k, n in counts.items() for i in range(0, n, part)]
        with get_context("spawn").Pool(2) as pool:
            made = pool.starmap(write, jobs, chunksize=1)
        found = {kind: [] for kind in counts}
        for (kind, *_), streams in zip(jobs, made):
            found[kind] += streams
        found = {kind: sorted(streams, key=lambda s: len(s.ids)) for kind, streams in found.items()}
        torch.save(found, file)
    return torch.load(file, weights_only=False)
