"""What comes of an edit: `EditResult`. Knows nothing of how it is decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from thinkclearly.colour import painted
from thinkclearly.editing.composite import composite
from thinkclearly.images import Letterbox


@dataclass
class EditResult:
    """One edit. All pictures have the source's own size.

    `image` and `source` are in the source's colours, with its transparency, profile, resolution and EXIF (see
    `colour.to_photo`), and keep them when saved. What the model draws is RGB in sRGB.

    Attributes:
        image: the composite; every pixel that `mask` calls CLEAR is the source's, byte for byte.
        token_composite: the decoded tokens, with the source's codes where CLEAR was chosen and those of its transform
            where another instruction was.
        raw: what the model would have drawn everywhere, instructions ignored; decoded when first asked for.
        input_decoded: the source through the tokenizer and back; decoded when first asked for.
        source: the picture that was edited.
        mask: mode "L", 255 where `image` is the source's own pixel, after smoothing and blending.
        gate_mask: mode "L", 255 where the patch's class is an instruction, before smoothing.
        class_ids: long (N,), the chosen classes; K and above are instruction tokens.
        fed_codes: long (N,), what went back into the model: classes with instructions replaced by the codes of what
            they stand for, CLEAR by the source's.
        codes: long (N,), the best code everywhere, instructions ignored.
        source_tokens: long (N,), the source's codes.
        gate: float32 (N,), log-odds of copying, see `Decoded`.
        chosen: bool (g, g), patches whose class is an instruction.
        clear: bool (g, g), those that are the source itself, after smoothing; with `feather: inside` the patches that
            `mask` shows.
        clear_fraction: share of the pixels that `mask` calls CLEAR.
        notes: what of the source could not be kept, e.g. 16 bits a channel.
        passes: forward passes of the batch that this edit was decoded in.
        accepted: positions that became final in each of them.
        logps: float32 (N,) where asked for, log-probability of each choice; see `Decoded`.
        transformed: long (I, N), codes of each instruction's transform of the source.
        seconds: of the batch, by stage.
        further: draws `raw` and `input_decoded`; holds the model until both were asked for, or the result is copied.
    """

    image: Image.Image
    token_composite: Image.Image
    source: Image.Image
    mask: Image.Image
    class_ids: torch.Tensor
    fed_codes: torch.Tensor
    codes: torch.Tensor
    source_tokens: torch.Tensor
    gate: torch.Tensor
    chosen: np.ndarray
    clear: np.ndarray
    clear_fraction: float
    letterbox: Letterbox
    instruction: str
    seed: int
    sample: int
    settings: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    passes: int = 0
    accepted: list[int] = field(default_factory=list)
    logps: torch.Tensor | None = None
    transformed: torch.Tensor | None = None
    seconds: dict = field(default_factory=dict)
    further: Callable[[str], Image.Image] | None = field(default=None, repr=False)

    @property
    def gate_mask(self) -> Image.Image:
        return Image.fromarray(np.uint8(self.letterbox.unfit_grid(self.chosen)) * 255)

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
        return composite(self.source, painted(self.raw, self.source), same, self.letterbox, *blend)[0]

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
            "gate_mask": self.gate_mask,
        }
        for name, picture in pictures.items():
            picture.save(directory / f"{name}.png")
        content = {
            "instruction": self.instruction,
            "size": self.source.size,
            "seed": self.seed,
            "sample": self.sample,
            "clear_fraction": self.clear_fraction,
            "notes": self.notes,
            "settings": self.settings,
            "passes": self.passes,
            "accepted": self.accepted,
            "seconds": self.seconds,
            "class_ids": self.class_ids.tolist(),
            "fed_codes": self.fed_codes.tolist(),
            "source_tokens": self.source_tokens.tolist(),
            "clear": self.clear.astype(int).tolist(),
        }
        (directory / "result.json").write_text(json.dumps(content, indent=1) + "\n")
        if trace:
            grid = self.clear.shape[0]
            with open(directory / "token_trace.jsonl", "w") as file:
                for i in range(len(self.class_ids)):
                    line = {
                        "position": i,
                        "row": i // grid,
                        "column": i % grid,
                        "class_id": int(self.class_ids[i]),
                        "fed_code": int(self.fed_codes[i]),
                        "code": int(self.codes[i]),
                        "source_token": int(self.source_tokens[i]),
                        "gate": None if self.gate[i].isnan() else float(self.gate[i]),
                    }
                    file.write(json.dumps(line) + "\n")
