"""The options of one edit, and the same as overrides on a command line. Knows nothing of how they are followed."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, make_dataclass

from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.recipe import option


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


# None where not given: a checkpoint brings defaults of its own.
SettingOverrides = make_dataclass(
    "SettingOverrides",
    [
        (
            f.name,
            {"str": str, "float": float, "int": int, "bool": bool}[f.type] | None,
            option(None, f.metadata["help"]),
        )
        for f in fields(EditSettings)
    ],
    namespace={"__doc__": "How to decode and composite; the checkpoint's own values where not given."},
)


def given(overrides: SettingOverrides) -> dict:
    """The settings that were given on the command line or in the recipe."""
    return {name: value for name, value in vars(overrides).items() if value is not None}
