"""Picture + instruction → EditResult; also text → picture and picture + question → words.

The one place where preprocessing, decoding and compositing meet. Knows nothing of training or of the Hub's pages.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from thinkclearly.config import option
from thinkclearly.decoding.engine import Decoded, DecodeSettings, decode
from thinkclearly.editing.composite import composite, smooth_mask
from thinkclearly.images import Letterbox, load_image, to_image
from thinkclearly.models.backbone import decode_tokens, embed_prompt, encode_tokens, image_features
from thinkclearly.models.clear_head import ClearEditModel
from thinkclearly.models.prompt import FULL, PART, UNCOND, ClearEditProcessor


@dataclass
class EditSettings(DecodeSettings):
    """Everything about one edit but picture, words and seed."""

    mask_smooth_ksize: int = option(1, "Majority filter over the CLEAR mask, odd size in patches; 1 for none.")
    mask_smooth_passes: int = option(1, "How often the majority filter is applied.")
    feather_radius_px: float = option(2.0, "Width of the blend beside CLEAR patches, pixels of the model's square.")
    feather: str = option("inside", "inside keeps CLEAR patches byte-identical; two_sided is the original's blur.")

    def __post_init__(self):
        super().__post_init__()
        if self.mask_smooth_ksize % 2 == 0 or self.mask_smooth_ksize < 1:
            raise ValueError(f"mask_smooth_ksize={self.mask_smooth_ksize}; expected an odd number, 1 for no smoothing")
        if self.mask_smooth_passes < 0:
            raise ValueError(f"mask_smooth_passes={self.mask_smooth_passes}; expected 0 or more")
        if not 0 <= self.feather_radius_px < math.inf:
            raise ValueError(f"feather_radius_px={self.feather_radius_px}; expected 0 (hard edge) or more")
        if self.feather not in ("inside", "two_sided"):
            raise ValueError(f"feather={self.feather!r}; choose 'inside' or 'two_sided'")


@dataclass
class EditResult:
    """One edit. All pictures have the source's own size.

    Attributes:
        image: the composite; every pixel of a CLEAR patch is the source's, byte for byte.
        token_composite: the decoded tokens with the source's codes where CLEAR was chosen.
        raw: what the model would have drawn everywhere, CLEAR ignored; decoded when first asked for.
        input_decoded: the source through the tokenizer and back; decoded when first asked for.
        source: the picture that was edited.
        mask: mode "L", 255 where the patch is CLEAR, before smoothing.
        ids: long (N,), classes; K and above are instruction tokens.
        tokens, codes, source_tokens: long (N,), see `Decoded`.
        gate: float32 (N,), log-odds of copying.
        clear: bool (g, g), the mask that the composite used.
        clear_fraction: share of CLEAR patches among those that show the picture (not the padding around it).
        passes: forward passes of the batch that this edit was decoded in.
        accepted: positions that became final in each of them.
        seconds: of the batch, by stage.
        further: draws `raw` and `input_decoded`; holds the model until both were asked for, or the result is copied.
    """

    image: Image.Image
    token_composite: Image.Image
    source: Image.Image
    mask: Image.Image
    ids: torch.Tensor
    tokens: torch.Tensor
    codes: torch.Tensor
    source_tokens: torch.Tensor
    gate: torch.Tensor
    clear: np.ndarray
    clear_fraction: float
    letterbox: Letterbox
    instruction: str
    seed: int
    sample: int
    settings: dict = field(default_factory=dict)
    passes: int = 0
    accepted: list[int] = field(default_factory=list)
    seconds: dict = field(default_factory=dict)
    further: Callable[[str], Image.Image] | None = field(default=None, repr=False)

    @cached_property
    def raw(self) -> Image.Image:
        return self._draw("codes", other="input_decoded")

    @cached_property
    def input_decoded(self) -> Image.Image:
        return self._draw("source_tokens", other="raw")

    def _draw(self, kind: str, other: str) -> Image.Image:
        if self.further is None:
            raise ValueError(
                "This result was made without the model that drew it; take its pictures from the original"
            )
        picture = self.further(kind)
        if other in vars(self):
            self.further = None  # the model may go
        return picture

    def __getstate__(self) -> dict:
        """A copy or a pickle has all pictures, and not the model that would draw them."""
        return vars(self) | {"raw": self.raw, "input_decoded": self.input_decoded, "further": None}

    def copy_matching_tokens(self) -> Image.Image:
        """What needs no CLEAR: the raw picture, with source pixels wherever its code equals the source's."""
        same = (self.codes == self.source_tokens).view(self.clear.shape).numpy()
        blend = self.settings["feather_radius_px"], self.settings["feather"]
        return composite(self.source, self.raw, same, self.letterbox, *blend)

    def save(self, directory: str | Path, trace: bool = False) -> None:
        """Writes the original's file names, `result.json`, and on request `token_trace.jsonl`, one line a position."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        pictures = {
            "input_image": self.source,
            "input_decoded": self.input_decoded,
            "raw_model": self.raw,
            "token_composite": self.token_composite,
            "pixel_composite": self.image,
            "copy_matching_tokens": self.copy_matching_tokens(),
            "clear_mask": self.mask,
        }
        for name, picture in pictures.items():
            picture.save(directory / f"{name}.png")
        content = {
            "instruction": self.instruction,
            "size": self.source.size,
            "seed": self.seed,
            "sample": self.sample,
            "clear_fraction": self.clear_fraction,
            "settings": self.settings,
            "passes": self.passes,
            "accepted": self.accepted,
            "seconds": self.seconds,
            "ids": self.ids.tolist(),
            "tokens": self.tokens.tolist(),
            "source_tokens": self.source_tokens.tolist(),
            "clear": self.clear.astype(int).tolist(),
        }
        (directory / "result.json").write_text(json.dumps(content, indent=1) + "\n")
        if trace:
            grid = self.clear.shape[0]
            with open(directory / "token_trace.jsonl", "w") as file:
                for i in range(len(self.ids)):
                    line = {
                        "position": i,
                        "row": i // grid,
                        "column": i % grid,
                        "id": int(self.ids[i]),
                        "token": int(self.tokens[i]),
                        "code": int(self.codes[i]),
                        "source_token": int(self.source_tokens[i]),
                        "gate": None if self.gate[i].isnan() else float(self.gate[i]),
                    }
                    file.write(json.dumps(line) + "\n")


class Editor:
    """A model that edits.

    Args:
        model: Janus with a CLEAR head.
        processor: belongs to the same checkpoint.
        settings: defaults of `edit`; those stored with the checkpoint where not given.
    """

    def __init__(self, model: ClearEditModel, processor: ClearEditProcessor, settings: EditSettings | None = None):
        self.model, self.processor = model.eval(), processor
        try:
            self.settings = settings or _override(EditSettings(), model.clear_config.edit)
        except TypeError as error:
            raise ValueError(f"The checkpoint's clear_config.json: {error}. A newer thinkclearly? Upgrade.") from error

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
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **overrides,
    ) -> list[EditResult]:
        """Edits a batch in one decoding loop; the `num_images` results of a picture lie next to each other."""
        settings = _override(self.settings, overrides)
        if len(images) != len(instructions) or not images:
            raise ValueError(f"{len(images)} pictures and {len(instructions)} instructions; give one for each picture")
        _check_count("num_images", num_images)
        for i, instruction in enumerate(instructions):
            if not instruction or not instruction.strip():
                raise ValueError(f"Item {i} has an empty instruction; say what to change, e.g. 'Make the scarf blue.'")
        clock = _Clock(self.model.device)
        sources = [load_image(image, name=f"item {i}" if len(images) > 1 else None) for i, image in enumerate(images)]
        boxes = [Letterbox(*source.size, self.processor.image_size) for source in sources]
        pixels = self.processor.pixel_values([box.fit(s) for box, s in zip(boxes, sources)]).to(self.model.device)
        source_tokens = encode_tokens(self.model.base, pixels)
        features = image_features(self.model.base, pixels)
        clock.lap("encode")

        conditions = _conditions(settings)
        picture = torch.arange(len(images), device=self.model.device).repeat_interleave(len(conditions))
        prompt = self.processor.edit_rows(
            [instruction for instruction in instructions for _ in conditions], conditions * len(images)
        ).to(self.model.device)
        embeds = embed_prompt(self.model.base, prompt, features[picture], source_tokens[picture])
        owner = [i for i in range(len(images)) for _ in range(num_images)]
        samples = [(seed, k) for _ in images for k in range(num_images)]
        n = self.processor.num_image_tokens
        decoded = decode(
            self.model,
            embeds,
            prompt.attention_mask,
            n,
            settings,
            source_tokens=source_tokens.repeat_interleave(num_images, dim=0),
            samples=samples,
            per_prompt=num_images,
            on_step=None if progress is None else lambda done: progress(done, n),
        )
        clock.lap("decode")
        drawn = _to_images(self.model, decoded.tokens)
        clock.lap("pictures")
        further = _Further(self.model, {"codes": decoded.codes, "source_tokens": source_tokens})
        results = [
            self._result(k, i, decoded, source_tokens[i], drawn[k], further, sources[i], boxes[i], settings)
            for k, i in enumerate(owner)
        ]
        clock.lap("composite")
        for result, i, (_, sample) in zip(results, owner, samples):
            result.instruction, result.seed, result.sample = instructions[i], seed, sample
            result.seconds = clock.laps
        return results

    def _result(
        self, k, i, decoded: Decoded, source_tokens, drawn, further: _Further, source, box: Letterbox, settings
    ) -> EditResult:
        grid, token_composite, place = self.processor.grid, box.unfit(drawn), {"codes": k, "source_tokens": i}
        chosen = self.model.vocabulary.is_instruction(decoded.ids[k]).view(grid, grid).cpu().numpy()
        clear = smooth_mask(chosen, settings.mask_smooth_ksize, settings.mask_smooth_passes)
        return EditResult(
            image=composite(source, token_composite, clear, box, settings.feather_radius_px, settings.feather),
            token_composite=token_composite,
            source=source,
            mask=Image.fromarray(np.uint8(box.unfit_grid(chosen)) * 255),
            ids=decoded.ids[k].cpu(),
            tokens=decoded.tokens[k].cpu(),
            codes=decoded.codes[k].cpu(),
            source_tokens=source_tokens.cpu(),
            gate=decoded.gate[k].cpu(),
            clear=clear,
            clear_fraction=float(chosen[box.content(grid)].mean()),
            letterbox=box,
            instruction="",
            seed=0,
            sample=0,
            settings=asdict(settings),
            passes=decoded.passes,
            accepted=[each[k] for each in decoded.accepted],
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
        if not prompt.strip():
            raise ValueError("The prompt is empty; describe the picture to draw")
        settings = _override(self.settings, overrides)
        _check_count("num_images", num_images)
        conditions = _conditions(replace(settings, cfg_weight2=0.0))  # there is no picture to leave out
        rows = self.processor.generate_rows([prompt] * len(conditions), conditions).to(self.model.device)
        n = self.processor.num_image_tokens
        decoded = decode(
            self.model,
            embed_prompt(self.model.base, rows),
            rows.attention_mask,
            n,
            settings,
            samples=[(seed, k) for k in range(num_images)],
            per_prompt=num_images,
            on_step=None if progress is None else lambda done: progress(done, n),
        )
        return _to_images(self.model, decoded.tokens)

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
        DecodeSettings(temperature=temperature, top_k=top_k, top_p=top_p)  # the same limits, the same messages
        _check_count("num_answers", num_answers)
        if temperature == 0 and num_answers > 1:
            raise ValueError(f"num_answers={num_answers} at temperature 0 would all be the same; set a temperature")
        source = load_image(image)
        square = Letterbox(*source.size, self.processor.image_size).fit(source)
        rows = self.processor.describe_rows([question]).to(self.model.device)
        features = image_features(self.model.base, self.processor.pixel_values([square]).to(self.model.device))
        sampling = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        with torch.random.fork_rng():  # the caller's random numbers are not ours to reset
            torch.manual_seed(seed)
            ids = self.model.base.generate(
                inputs_embeds=embed_prompt(self.model.base, rows, features),
                attention_mask=rows.attention_mask,
                max_new_tokens=max_new_tokens,
                num_return_sequences=num_answers,
                eos_token_id=self.processor.eos_id,
                bos_token_id=self.processor.bos_id,
                pad_token_id=self.processor.eos_id,
                **sampling,
            )
        return [text.strip() for text in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _override(settings: EditSettings, overrides: dict) -> EditSettings:
    known = {f.name for f in fields(EditSettings)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(f"Unknown settings {unknown}; choose from {sorted(known)}")
    return replace(settings, **overrides)


def _conditions(settings: DecodeSettings) -> list[int]:
    """The guidance rows that have a weight: decoding a row only to multiply it by 0 would be waste."""
    if settings.use_cfg and settings.cfg_weight2:
        return [FULL, PART, UNCOND]
    return [FULL, UNCOND] if settings.use_cfg and settings.cfg_weight != 1 else [FULL]


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value}; expected 1 or more")


def _to_images(model: ClearEditModel, tokens: torch.Tensor) -> list[Image.Image]:
    return [to_image(pixels) for pixels in decode_tokens(model.base, tokens).cpu()]


class _Further:
    """Pictures that few ask for, decoded for the whole batch when the first of a kind is."""

    def __init__(self, model: ClearEditModel, tokens: dict[str, torch.Tensor]):
        self.model, self.tokens, self.pictures = model, {kind: t.cpu() for kind, t in tokens.items()}, {}

    def __call__(self, kind: str) -> list[Image.Image]:
        if kind not in self.pictures:
            self.pictures[kind] = _to_images(self.model, self.tokens[kind].to(self.model.device))
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
