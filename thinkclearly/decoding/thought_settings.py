"""How to think: the options of words and pictures that alternate. Light, so that a command line can list them.

The rows of guidance and their weights: GAIR-NLP/thinking-with-generated-images, inference.py and the paper's Table 5
(arXiv 2505.22525).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.recipe import check_choice, option
from thinkclearly.sequence import FULL, UNCOND

PICTURES, NEGATIVE, PROMPT = "pictures", "negative", "prompt"
MODES, KINDS = ("general", "critique", "subgoals"), ("normal", "obj", "full")
PRESETS = {
    "code": "the scales of the original's code, which forgets the prompt row of sub-goals",
    "paper": "the paper's scales",
    "repaired": "the code's scales, with the prompt row everywhere",
}
# Scales of the rows full, pictures, negative and prompt.
_CODE = (2.0, 1.2, 0.0, 5.0)
_PAPER = {("subgoals", "obj"): (5.0, 0.0, 3.0, 0.0), ("subgoals", "full"): (2.0, 1.2, 3.0, 5.0)}
_PAPER |= {("critique", kind): (1.5, 0.8, 3.0, 5.0) for kind in KINDS}
NEGATIVE_PROMPT = (
    "text in the image, text, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, "
    "fewer digits, cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)


@dataclass
class ThoughtSettings:
    """How to think."""

    mode: str = option(
        "critique",
        "critique: draw, say what is wrong, draw again; subgoals: object by object, then all; general: free.",
    )
    preset: str = option("repaired", "; ".join(f"{name}: {what}" for name, what in PRESETS.items()) + ".")
    guidance_kind: str | None = option(
        None,
        "Rows of guidance: normal (full, pictures, uncond), obj (full, negative, uncond) or full (all five). If not "
        "given: critique full, subgoals obj and from the third picture on full, general normal.",
    )
    full_scale: float | None = option(None, "Scale of the row that is told everything; the preset's if not given.")
    pictures_scale: float | None = option(None, "Scale of the row that is told the pictures alone; likewise.")
    negative_scale: float | None = option(None, "Scale of the negative prompt's row; likewise.")
    prompt_scale: float | None = option(None, "Scale of the row that is told the bare prompt; likewise.")
    negative_prompt: str = option(NEGATIVE_PROMPT, "What the negative row is told.")
    temperature: float = option(1.0, "Sampling temperature of words; 0 decodes greedily.")
    top_k: int = option(50, "Sample words from the k best; 0 for all.")
    top_p: float = option(0.9, "Sample words from the smallest set with this probability mass.")
    picture_temperature: float = option(1.0, "Sampling temperature of codes; 0 decodes greedily.")
    picture_top_k: int = option(50, "Sample codes from the k best; 0 for all.")
    picture_top_p: float = option(1.0, "Sample codes from the smallest set with this probability mass.")
    max_length: int = option(6144, "Tokens of a thought at most, prompt included; a picture is begun only if it fits.")
    max_pictures: int = option(4, "Pictures of a thought at most.")
    second: str = option(
        "edit",
        "A picture after the first. edit: the picture before is its draft, and its source where the model has CLEAR; "
        "draw: it is drawn like the first.",
    )
    prefer: str = option("balanced", "Where CLEAR is in doubt: balanced, edit (no holes) or exact.")
    block: int = option(0, "Codes that one pass checks; 0 adapts, 1 decodes one by one. The codes are the same.")

    def __post_init__(self):
        check_choice("mode", self.mode, MODES)
        check_choice("preset", self.preset, tuple(PRESETS))
        check_choice("second", self.second, ("edit", "draw"))
        if self.guidance_kind is not None:
            check_choice("guidance_kind", self.guidance_kind, KINDS)
        for name in ("full_scale", "pictures_scale", "negative_scale", "prompt_scale"):
            if (scale := getattr(self, name)) is not None and not math.isfinite(scale):
                raise ValueError(f"{name}={scale}; expected a finite number")
        for name in ("max_length", "max_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 or more")
        DecodeSettings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        self.drawing()

    def drawing(self) -> DecodeSettings:
        """How a picture's codes are decoded."""
        return DecodeSettings(
            temperature=self.picture_temperature,
            top_k=self.picture_top_k,
            top_p=self.picture_top_p,
            prefer=self.prefer,
            block=self.block,
        )

    def weights(self, picture: int) -> dict[str, float]:
        """Name → weight of the rows that picture number `picture` (from 0) of a thought is guided by; sum 1.

        With u, f, p, n and o for the rows uncond, full, pictures, negative and prompt and a, b, c, d for the scales:
        normal u + a(f − u) + b(p − u), obj u + a(f − u) − c(n − u),
        full u + a(f − p) + b(p − u) − c(n − u) + d(o − u).
        """
        kind = self.guidance_kind or self._kind(picture)
        preset = _PAPER.get((self.mode, kind), _CODE) if self.preset == "paper" else _CODE
        own = (self.full_scale, self.pictures_scale, self.negative_scale, self.prompt_scale)
        a, b, c, d = (scale if scale is not None else default for scale, default in zip(own, preset))
        others = {
            "normal": {PICTURES: b},
            "obj": {NEGATIVE: -c},
            "full": {PICTURES: b - a, NEGATIVE: -c, PROMPT: d},
        }[kind]
        others[UNCOND] = 1 - a - sum(others.values())
        return {FULL: a} | {name: weight for name, weight in others.items() if weight}

    def _kind(self, picture: int) -> str:
        if self.mode == "subgoals":
            return "obj" if picture < 2 else "full"
        return "full" if self.mode == "critique" else "normal"
