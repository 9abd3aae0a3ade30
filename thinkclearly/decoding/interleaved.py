"""Words and pictures in one stream: words until a picture begins or the end, then the picture, and so on.

Pictures are drawn by the loop of `decoding.engine`. What has been read stays read, across phases as well. Knows ids
and codes; does not know what a thought is about, nor pixels.
Source: GAIR-NLP/thinking-with-generated-images, inference.py, which reads the whole stream again for every phase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from thinkclearly.decoding.engine import draw_codes, longest_block
from thinkclearly.decoding.reader import PictureRows, Reader
from thinkclearly.decoding.sampling import draw, gumbel_noise, warpers
from thinkclearly.decoding.thought_settings import NEGATIVE, PICTURES, PROMPT, ThoughtSettings
from thinkclearly.instructions import CLEAR
from thinkclearly.models.chameleon.processor import IMAGE, TEMPLATES, ChameleonProcessor
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.sequence import FULL, UNCOND


@dataclass(frozen=True)
class Context:
    """What a thought begins with.

    Attributes:
        ids: the prompt as it is read; where it ends with BOI, the first picture comes before any word.
        prompt_ids: what the row `prompt` is told.
        pictures: codes of the pictures in `ids` that are the thought's own: the next one may edit the last.
    """

    ids: list[int]
    prompt_ids: list[int]
    pictures: Sequence[list[int]] = ()


@dataclass(frozen=True)
class Said:
    """Words of a thought, as ids."""

    ids: list[int]


@dataclass(frozen=True)
class Drew:
    """A picture of a thought.

    Attributes:
        codes: N codes.
        copied: N, which of them are the picture before, by an instruction token; None where the head had no say.
        passes: forward passes until its last code was final.
    """

    codes: list[int]
    copied: list[bool] | None
    passes: int


@dataclass(frozen=True)
class Ended:
    """The end of a thought.

    Attributes:
        reason: "eos", "max_pictures" or "max_length".
        ids: the whole stream, prompt included; pictures in it are whole.
    """

    reason: str
    ids: list[int]


def context(
    processor: ChameleonProcessor, prompt: str, settings: ThoughtSettings, pictures: Sequence[Sequence[int]] = ()
) -> Context:
    """The context of a prompt.

    As in the original, the presets `code` and `paper` begin critiques and sub-goals without BOS, though training has
    it, and `code` tells the row `prompt` nothing in sub-goals.

    Args:
        pictures: codes of the pictures that stand at the marks `<image>` of the prompt (mode general).

    Raises:
        ValueError: an empty prompt, or not as many pictures as marks.
    """
    prompt, marks = prompt.strip(), prompt.count(IMAGE)
    if not prompt:
        raise ValueError("The prompt is empty; say what to think about")
    if marks != len(pictures) or (marks and settings.mode != "general"):
        raise ValueError(
            f"{prompt!r:.60} has {marks} marks {IMAGE} and comes with {len(pictures)} pictures in mode "
            f"{settings.mode!r}; expected as many of one as of the other, in mode 'general'"
        )
    bos = settings.mode == "general" or settings.preset == "repaired"
    words = TEMPLATES[settings.mode].format(p=prompt).split(IMAGE)
    ids = processor.encode_words(words[0], bos=bos)
    for codes, text in zip(pictures, words[1:]):
        ids += processor.picture_ids(codes) + processor.encode_words(text, bos=False)
    ids.append(processor.sep_id)
    if settings.mode == "general":
        return Context(ids, ids)
    forgotten = settings.mode == "subgoals" and settings.preset == "code"
    raw = [] if forgotten else processor.encode_words(prompt, bos=False)
    return Context(ids + [processor.boi_id] * (settings.mode == "critique"), raw)


@torch.inference_mode()
def interleave(
    model: InstructionModel,
    processor: ChameleonProcessor,
    contexts: Sequence[Context],
    settings: ThoughtSettings,
    samples: Sequence[tuple[int, int]],
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Said | Drew | Ended]]:
    """Thinks about several prompts at once; none depends on the others. Yields (number of the prompt, part).

    Args:
        samples: (seed, sample number) of each thought, which key its noise.
        on_step: called with the number of tokens so far, of all thoughts.

    Raises:
        ValueError: the model has instruction tokens other than CLEAR.
    """
    if model.vocabulary.names not in ((), (CLEAR,)):
        raise ValueError(f"Thinking knows CLEAR alone; the model has {', '.join(model.vocabulary.names)}")
    stream = _Interleaver(model, processor, contexts, settings, samples, on_step)
    while any(thought.ended is None for thought in stream.thoughts):
        yield from stream.write()
        yield from stream.draw()


@dataclass
class _Row:
    """Ids of one row, of which the first `read` have keys and values."""

    ids: list[int]
    read: int = 0


@dataclass
class _Thought:
    """One stream and where it stands.

    Attributes:
        rows: by name; `full` is the stream itself.
        said: the words since the last picture.
        parts: how many have been yielded.
    """

    number: int
    key: tuple[int, int]
    rows: dict[str, _Row]
    said: list[int] = field(default_factory=list)
    pictures: list[list[int]] = field(default_factory=list)
    parts: int = 0
    ended: str | None = None

    @property
    def ids(self) -> list[int]:
        return self.rows[FULL].ids


class _Interleaver:
    """T thoughts with R rows each in one cache; every row stands where it stands."""

    def __init__(self, model, processor, contexts, settings: ThoughtSettings, samples, on_step):
        self.model, self.family, self.processor, self.settings = model, model.token_model, processor, settings
        self.on_step, self.device, self.num_tokens = on_step, model.device, 0
        weights = [settings.weights(k) for k in range(settings.max_pictures)]
        self.names = list(dict.fromkeys(name for names in weights for name in names))
        # As in the original: BOS stays in the row of pictures where the config calls it BOS, which few do.
        self.in_pictures = {*processor.code_ids, processor.boi_id, processor.eoi_id, model.config.bos_token_id}
        self.no_word = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.no_word[[*processor.code_ids, processor.eoi_id]] = True
        negative = processor.encode_words(settings.negative_prompt, bos=False)
        boi = processor.boi_id
        self.thoughts = []
        for number, (start, key) in enumerate(zip(contexts, samples)):
            told = {UNCOND: [boi], NEGATIVE: [*negative, boi], PROMPT: [*start.prompt_ids, boi], PICTURES: []}
            rows = {name: _Row(told.get(name, [])) for name in self.names}
            self.thoughts.append(_Thought(number, tuple(key), rows, pictures=list(start.pictures)))
            self._append(self.thoughts[-1], start.ids)
        self.reader = Reader(self.family, torch.ones(len(self.thoughts) * len(self.names), 1, device=self.device) > 0)
        self.filters = warpers(settings.temperature, settings.top_k, settings.top_p)

    # ---- words -------------------------------------------------------------------------------------------------

    def write(self) -> Iterator[tuple[int, Said | Ended]]:
        """Words of every thought that is not about to draw, up to a BOI or its end."""
        while writing := [t for t in self.thoughts if t.ended is None and t.ids[-1] != self.processor.boi_id]:
            full = [t for t in writing if len(t.ids) >= self.settings.max_length]
            for thought in full:
                yield from self._stop_writing(thought, "max_length")
            writing = [t for t in writing if t not in full]
            for thought, token in zip(writing, self._next_words(writing)):
                self._append(thought, [token])
                if token in (self.processor.eos_id, self.processor.boi_id):
                    yield from self._stop_writing(thought, "eos" if token == self.processor.eos_id else None)
                else:
                    thought.said.append(token)
            self._count(len(writing))

    def _next_words(self, writing: list[_Thought]) -> list[int]:
        if not writing:
            return []
        hidden = self._read([(thought, FULL) for thought in writing], up_to=0)
        logits = self.family.word_logits(hidden).to(self.device)  # (T, V)
        logits = logits.masked_fill(self._forbidden(writing), torch.finfo(logits.dtype).min)
        noise = None
        if self.settings.temperature > 0:
            keys = [(*t.key, t.parts + 1, len(t.said) + 1) for t in writing]
            noise = torch.cat([gumbel_noise(key, 1, logits.shape[-1]) for key in keys]).to(self.device)
        return draw(logits, noise, self.filters).tolist()

    def _forbidden(self, writing: list[_Thought]) -> torch.Tensor:
        """Bool (T, V): ids of pictures and EOI; BOI as well where no picture would fit."""
        forbidden, whole = self.no_word.repeat(len(writing), 1), self.processor.num_image_tokens + 2
        for row, thought in zip(forbidden, writing):
            row[self.processor.boi_id] = self.settings.max_length - len(thought.ids) < whole
        return forbidden

    def _stop_writing(self, thought: _Thought, reason: str | None) -> Iterator[tuple[int, Said | Ended]]:
        if thought.said:
            yield self._part(thought, Said(thought.said))
            thought.said = []
        if reason:
            yield self._end(thought, reason)

    # ---- pictures ----------------------------------------------------------------------------------------------

    def draw(self) -> Iterator[tuple[int, Drew | Ended]]:
        """A picture for every thought that goes on; those that are guided alike are drawn together."""
        groups: dict[tuple, list[_Thought]] = {}
        for thought in (t for t in self.thoughts if t.ended is None):
            found = self.settings.weights(len(thought.pictures))
            weights = tuple((name, found[name]) for name in self.names if name in found)
            with_source = bool(thought.pictures) and self.settings.second == "edit"
            groups.setdefault((weights, with_source), []).append(thought)
        for (weights, with_source), thoughts in groups.items():
            yield from self._draw(thoughts, dict(weights), with_source)

    def _draw(self, thoughts: list[_Thought], weights: dict[str, float], with_source: bool):
        # 1. Read the rows up to BOI, which is read with the first codes.
        rows = [(thought, name) for thought in thoughts for name in weights]
        # One by one by name: their lengths differ, and the shorter ones would be padded.
        for name in weights:
            new = [(t, name) for t in thoughts if len(t.rows[name].ids) - t.rows[name].read > 1]
            if new:
                self._read(new, up_to=-1)
        last = [len(thought.rows[name].ids) - 1 for thought, name in rows]
        n, settings = self.processor.num_image_tokens, self.settings.drawing()
        self._reserve(max(last) + n + longest_block(settings, n))
        # 2. Draw.
        boi = self.family.embed_words(torch.full((len(rows), 1), self.processor.boi_id, device=self.device))
        source = torch.tensor([t.pictures[-1] for t in thoughts], device=self.device) if with_source else None
        may_copy = with_source and self.settings.mode == "critique" and len(self.model.vocabulary) > 0
        before = self.num_tokens
        decoded = draw_codes(
            self.model,
            PictureRows(self.reader, boi, last, len(weights), [self._place(*row) for row in rows]),
            n,
            settings,
            rows=weights,
            samples=[(*thought.key, thought.parts + 1) for thought in thoughts],
            source_tokens=source,
            # Only a critique is an instruction to edit the picture before; elsewhere that is no more than a draft.
            transformed=source.unsqueeze(1) if may_copy else None,
            on_step=lambda done: self._count(before + len(thoughts) * done - self.num_tokens),
        )
        # 3. Go on behind the pictures; all of their codes but the last have been read.
        copied = self.model.vocabulary.is_instruction(decoded.class_ids).tolist()
        for k, (thought, codes) in enumerate(zip(thoughts, decoded.fed_codes.tolist())):
            for name in {FULL, PICTURES} & weights.keys():
                thought.rows[name].read = len(thought.rows[name].ids) + len(codes) - 1
            self._append(thought, self.processor.picture_ids(codes)[1:])
            thought.pictures.append(codes)
            passes = sum(fresh[k] > 0 for fresh in decoded.accepted)
            yield self._part(thought, Drew(codes, copied[k] if may_copy else None, passes))
            if len(thought.pictures) == self.settings.max_pictures:
                yield self._end(thought, "max_pictures")

    # ---- rows --------------------------------------------------------------------------------------------------

    def _read(self, rows: list[tuple[_Thought, str]], up_to: int) -> torch.Tensor:
        """Reads what is new in these rows; returns the last hidden state of each, (A, H).

        Args:
            up_to: 0 for everything, -1 for all but the last id.
        """
        found = [thought.rows[name] for thought, name in rows]
        ends = [len(row.ids) + up_to for row in found]
        new = [row.ids[row.read : end] for row, end in zip(found, ends)]
        starts, width = torch.tensor([row.read for row in found], device=self.device), max(map(len, new))
        # What fills up the shorter ones is overwritten before anything sees it.
        ids = torch.tensor([part + [self.processor.pad_id] * (width - len(part)) for part in new], device=self.device)
        slots = starts.unsqueeze(1) + torch.arange(width, device=self.device)
        end = max(row.read for row in found) + width
        self._reserve(end)
        hidden = self.reader.read(self.family.embed_words(ids), slots, end, [self._place(*row) for row in rows])
        for row, last in zip(found, ends):
            row.read = last
        index = torch.tensor([len(part) - 1 for part in new], device=self.device).clamp(min=0)
        return hidden[torch.arange(len(new), device=self.device), index]

    def _place(self, thought: _Thought, name: str) -> int:
        return thought.number * len(self.names) + self.names.index(name)

    def _reserve(self, slots: int) -> None:
        room, most = self.reader.cache.visible.shape[1], self.settings.max_length + self.processor.num_image_tokens
        if slots > room:
            self.reader.reserve(max(slots, min(2 * room, most)))

    def _append(self, thought: _Thought, ids: list[int]) -> None:
        thought.rows[FULL].ids.extend(ids)
        if PICTURES in thought.rows:
            thought.rows[PICTURES].ids.extend(i for i in ids if i in self.in_pictures)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _part(self, thought: _Thought, part: Said | Drew) -> tuple[int, Said | Drew]:
        thought.parts += 1
        return thought.number, part

    def _end(self, thought: _Thought, reason: str) -> tuple[int, Ended]:
        thought.ended = reason
        return thought.number, Ended(reason, list(thought.ids))

    def _count(self, tokens: int) -> None:
        self.num_tokens += tokens
        if self.on_step is not None:
            self.on_step(self.num_tokens)
