"""Picture + instruction → EditResult; also text → picture and picture + question → words.

The one place where preprocessing, decoding and compositing meet. Knows nothing of training or of the Hub's pages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from thinkclearly.colour import painted, seen
from thinkclearly.decoding.engine import Decoded, decode, guided_rows
from thinkclearly.decoding.interleaved import Ended
from thinkclearly.decoding.settings import check_seed
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.editing.composite import assemble, composite, smooth_mask
from thinkclearly.editing.result import EditResult
from thinkclearly.editing.settings import EditSettings
from thinkclearly.editing.think import think
from thinkclearly.generation.describe import describe
from thinkclearly.generation.draw import draw, to_pictures
from thinkclearly.generation.think import Picture, Text
from thinkclearly.images import Letterbox, load_image, load_photo
from thinkclearly.models.fingerprint import fingerprint
from thinkclearly.models.instruction_head import InstructionModel
from thinkclearly.models.protocol import Processor
from thinkclearly.sequence import drawing, named_rows

logger = logging.getLogger(__name__)


class Editor:
    """A model that edits.

    Args:
        model: of any family; without instruction tokens it paints everything.
        processor: belongs to the same checkpoint.
        settings: defaults of `edit`; those stored with the checkpoint where not given.
    """

    def __init__(self, model: InstructionModel, processor: Processor, settings: EditSettings | None = None):
        self.model, self.processor = model.eval(), processor
        try:
            self.settings = settings or _override(EditSettings(), model.clear_config.edit)
        except TypeError as error:
            raise ValueError(f"The checkpoint's clear_config.json: {error}. A newer thinkclearly? Upgrade.") from error

    def fingerprint(self, **overrides) -> dict:
        """What an edit depends on besides picture, words and seed: `models.fingerprint`, and all `settings`.

        Args:
            overrides: fields of `EditSettings`, as for `edit`.
        """
        return fingerprint(self.model) | {"settings": asdict(_override(self.settings, overrides))}

    def edit(self, image, instruction: str, *, num_images: int = 1, seed: int = 0, progress=None, **overrides):
        """Edits one picture.

        Args:
            image: path, bytes, PIL picture or array, of any size and shape.
            instruction: what to change, e.g. "Make the scarf blue."
            num_images: samples; a list of results comes back when more than one is asked for.
            seed: with the sample's number it keys all noise, so the same call gives the same picture.
            progress: called with (positions done, positions in all).
            overrides: fields of `EditSettings`.
        """
        results = self.edit_many(
            [image], [instruction], num_images=num_images, seed=seed, progress=progress, **overrides
        )
        return results[0] if num_images == 1 else results

    @torch.inference_mode()
    def edit_many(
        self,
        images: list,
        instructions: list[str],
        *,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        progress: Callable[[int, int], None] | None = None,
        keep_logps: bool = False,
        **overrides,
    ) -> list[EditResult]:
        """Edits a batch in one decoding loop; the `num_images` results of a picture lie next to each other.

        Args:
            seed: of all pictures, or one for each.
            keep_logps: fill in the results' `logps`.
            overrides: fields of `EditSettings`.
        """
        settings = _override(self.settings, overrides)
        if len(images) != len(instructions) or not images:
            raise ValueError(f"{len(images)} pictures and {len(instructions)} instructions; give one for each picture")
        _check_count("num_images", num_images)
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * len(images)
        for each in seeds:
            check_seed(each)
        for i, instruction in enumerate(instructions):
            if not instruction or not instruction.strip():
                raise ValueError(f"Item {i} has an empty instruction; say what to change, e.g. 'Make the scarf blue.'")
        clock = _Clock(self.model.device)
        sources = [load_photo(image, name=f"item {i}" if len(images) > 1 else None) for i, image in enumerate(images)]
        for note in {note for source in sources for note in source.info.get("notes", ())}:
            _warn_once(note)
        boxes = [Letterbox(*source.size, self.processor.image_size) for source in sources]
        squares = [box.fit(seen(source)) for box, source in zip(boxes, sources)]
        family, pixels = self.model.token_model, self.processor.pixel_values(squares).to(self.model.device)
        source_tokens = family.encode(pixels)
        features = None if self.processor.sees_codes else family.see(pixels)
        originals = [self._original(*each) for each in zip(sources, boxes, source_tokens)]
        clock.lap("encode")

        rows = guided_rows(settings, has_source=True)
        edits = [drawing(words.strip(), [i]) for i, words in enumerate(instructions)]
        prompt = self.processor.rows(named_rows(edits, rows)).to(self.model.device)
        owner = [i for i in range(len(images)) for _ in range(num_images)]
        samples = [(each, k) for each in seeds for k in range(num_images)]
        n = self.processor.num_image_tokens
        decoded = decode(
            self.model,
            family.embed_prompt(prompt, features, source_tokens),
            prompt.attention_mask,
            n,
            settings,
            rows=rows,
            samples=samples,
            per_prompt=num_images,
            source_tokens=source_tokens.repeat_interleave(num_images, dim=0),
            transformed=torch.stack([o.codes for o in originals]).repeat_interleave(num_images, dim=0),
            on_step=None if progress is None else lambda done: progress(done, n),
            keep_logps=keep_logps,
        )
        clock.lap("decode")
        drawn = to_pictures(self.model, decoded.fed_codes)
        clock.lap("pictures")
        further = LazyPictures(self.model, {"codes": decoded.codes, "source_tokens": source_tokens})
        results = [
            self._result(k, i, decoded, source_tokens[i], drawn[k], further, originals[i], settings)
            for k, i in enumerate(owner)
        ]
        clock.lap("composite")
        for result, i, (of_picture, sample) in zip(results, owner, samples):
            result.instruction, result.seed, result.sample = instructions[i], of_picture, sample
            result.seconds = clock.laps
        return results

    def _original(self, source: Image.Image, box: Letterbox, source_tokens: torch.Tensor) -> _Original:
        """The source with each instruction's transform of it, as pictures and as codes."""
        vocabulary, device = self.model.vocabulary, source_tokens.device
        pictures = vocabulary.transforms(source)
        codes = [source_tokens] * len(pictures)
        for i, picture in enumerate(pictures):
            if picture is not source:
                square = self.processor.pixel_values([box.fit(seen(picture))]).to(device)
                codes[i] = self.model.token_model.encode(square)[0]
        n = self.processor.num_image_tokens
        return _Original(source, box, pictures, torch.stack(codes) if codes else source_tokens.new_zeros(0, n))

    def _result(
        self, k, i, decoded: Decoded, source_tokens, drawn, further: LazyPictures, original: _Original, settings
    ) -> EditResult:
        source, box, grid = original.source, original.box, self.processor.grid
        token_composite, place = box.unfit(drawn), {"codes": k, "source_tokens": i}
        rows = self.model.vocabulary.rows(decoded.class_ids[k]).view(grid, grid).cpu().numpy()
        chosen = rows >= 0
        copied = smooth_mask(chosen, settings.mask_smooth_ksize, settings.mask_smooth_passes)
        base, clear = assemble(source, original.pictures, np.where(copied, rows, -1), box), copied.copy()
        for row, picture in enumerate(original.pictures):
            clear &= (rows != row) | (picture is source)
        edited = painted(token_composite, source)
        image, kept = composite(base, edited, copied, box, settings.feather_radius_px, settings.feather)
        kept &= box.unfit_grid(clear)
        return EditResult(
            image=image,
            token_composite=token_composite,
            source=source,
            mask=Image.fromarray(np.uint8(kept) * 255),
            class_ids=decoded.class_ids[k].cpu(),
            fed_codes=decoded.fed_codes[k].cpu(),
            codes=decoded.codes[k].cpu(),
            source_tokens=source_tokens.cpu(),
            gate=decoded.gate[k].cpu(),
            chosen=chosen,
            clear=clear,
            clear_fraction=float(kept.mean()),
            letterbox=box,
            instruction="",
            seed=0,
            sample=0,
            settings=asdict(settings),
            notes=(*source.info.get("notes", ()), *_invisible(source, kept)),
            passes=decoded.passes,
            accepted=[each[k] for each in decoded.accepted],
            logps=None if decoded.logps is None else decoded.logps[k].cpu(),
            transformed=original.codes.cpu(),
            further=lambda kind: box.unfit(further(kind)[place[kind]]),
        )

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        *,
        num_images: int = 1,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **overrides,
    ) -> list[Image.Image]:
        """Text to pictures of the model's own square size; `overrides` are fields of `DecodeSettings`."""
        settings = _override(self.settings, overrides)
        _check_count("num_images", num_images)
        check_seed(seed)
        n = self.processor.num_image_tokens
        decoded = draw(
            self.model,
            self.processor,
            [prompt],
            settings,
            samples=[(seed, k) for k in range(num_images)],
            on_step=None if progress is None else lambda done: progress(done, n),
        )
        return to_pictures(self.model, decoded.fed_codes)

    @torch.inference_mode()
    def describe(
        self,
        image,
        question: str,
        *,
        num_answers: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers a question about a picture, `num_answers` times; temperature 0 decodes greedily."""
        _check_count("num_answers", num_answers)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return describe(
            self.model,
            self.processor,
            load_image(image),
            question,
            num_answers=num_answers,
            max_new_tokens=max_new_tokens,
            **sampling,
        )

    def think(
        self, prompt: str, *, images=(), seed: int = 0, progress: Callable[[int], None] | None = None, **overrides
    ) -> Iterator[Text | Picture]:
        """Thinks about a prompt; words (`.text`) and pictures (`.image`, `.changed`) come as they are made.

        `Thought(list(editor.think(...)))` has them all, with `.first`, `.last` and `.text`. See `editing.think.think`
        for how models without one stream of words and pictures think.

        Args:
            images: paths or pictures that the prompt shows, with `mode="general"` and a Chameleon model.
            progress: called with the number of tokens so far.
            overrides: fields of `ThoughtSettings`, e.g. `mode="subgoals"`.
        """
        check_seed(seed)
        shown = [[load_photo(image) for image in images]]
        options = {"samples": [(seed, 0)], "pictures": shown, "on_step": progress}
        stream = think(self, [prompt], ThoughtSettings(**overrides), **options)
        return (part for _, part in stream if not isinstance(part, Ended))


def _override(settings: EditSettings, overrides: dict) -> EditSettings:
    known = {f.name for f in fields(EditSettings)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(f"Unknown settings {unknown}; choose from {sorted(known)}")
    return replace(settings, **overrides)


def _invisible(source: Image.Image, kept: np.ndarray) -> list[str]:
    """A note where paint cannot be seen: an edit changes colours and leaves transparency as it is."""
    if source.mode != "RGBA" or kept.all():
        return []
    share = (np.asarray(source.getchannel("A"))[~kept] == 0).mean()
    text = f"{share:.0%} of the edited pixels are fully transparent in the source and stay so; lay it on a background."
    return [text] if share else []


@lru_cache
def _warn_once(note: str) -> None:
    logger.warning(note)


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}; expected 1 or more")


@dataclass
class _Original:
    """A picture to edit: what its patches can be copied from."""

    source: Image.Image
    box: Letterbox
    pictures: list[Image.Image]  # each instruction's transform of the source
    codes: torch.Tensor  # long (I, N), theirs


class LazyPictures:
    """Pictures that few ask for, decoded for the whole batch when the first of a kind is."""

    def __init__(self, model: InstructionModel, tokens: dict[str, torch.Tensor]):
        self.model, self.tokens, self.pictures = model, {kind: t.cpu() for kind, t in tokens.items()}, {}

    def __call__(self, kind: str) -> list[Image.Image]:
        if kind not in self.pictures:
            self.pictures[kind] = to_pictures(self.model, self.tokens[kind].to(self.model.device))
        return self.pictures[kind]


class _Clock:
    """Seconds per stage."""

    def __init__(self, device: torch.device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 4), now
