"""The metrics as `evaluate.Metric` classes, for code that collects with `.add_batch` and ends with `.compute`.

Nothing is downloaded: the classes are used directly, not through `evaluate.load`.
"""

from __future__ import annotations

import datasets
import evaluate
import numpy as np

from thinkclearly.evaluation.metrics import (
    aggregate_clear_metrics,
    aggregate_image_metrics,
    clear_metrics,
    image_metrics,
)
from thinkclearly.images import MASK_THRESHOLD

_GIE_BENCH = "https://github.com/apple/ml-gie-bench"
_WANG = """@article{wang2004ssim,
  title={Image quality assessment: from error visibility to structural similarity},
  author={Wang, Zhou and Bovik, Alan C and Sheikh, Hamid R and Simoncelli, Eero P},
  journal={IEEE Transactions on Image Processing}, volume={13}, number={4}, pages={600--612}, year={2004}}"""


class EditImageMetric(evaluate.Metric):
    """MSE, PSNR, SSIM, largest difference and share of exact pixels over a set of pictures.

    `EditImageMetric()` takes `predictions` and `references`: PIL pictures or uint8 arrays (H, W, 3).
    `EditImageMetric("masked")` also takes `masks`, bool (H, W) or "L" pictures with the edited area white, and adds
    the numbers inside and outside them. `compute` gives what `aggregate_image_metrics` gives.

    The pictures wait as PNG in `cache_dir`, so nothing is lost; `compute` holds them all in memory at once.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "masked"):
            raise ValueError(f"EditImageMetric has no configuration {self.config_name!r}; use 'default' or 'masked'.")
        names = ("predictions", "references") + (("masks",) if self.config_name == "masked" else ())
        return evaluate.MetricInfo(
            description="How far edited pictures are from references, whole and inside and outside an edit mask.",
            citation=_WANG,
            inputs_description=EditImageMetric.__doc__,
            features=datasets.Features({name: datasets.Image() for name in names}),
            reference_urls=[_GIE_BENCH],
        )

    def _compute(self, predictions, references, masks=None) -> dict[str, float | int | None]:
        if masks is None:
            return aggregate_image_metrics([image_metrics(*pair) for pair in zip(predictions, references)])
        edited = (np.asarray(mask.convert("L")) > MASK_THRESHOLD for mask in masks)
        return aggregate_image_metrics([image_metrics(*triple) for triple in zip(predictions, references, edited)])


class ClearMaskMetric(evaluate.Metric):
    """Precision, recall and F1 of CLEAR and IoU of the edited region, pooled over pictures.

    `predictions` and `references` hold one bool sequence (N,) a picture, True where CLEAR; N may differ between
    pictures. `compute` gives what `aggregate_clear_metrics` gives.
    """

    def _info(self) -> evaluate.MetricInfo:
        masks = datasets.List(datasets.Value("bool"))
        return evaluate.MetricInfo(
            description="How well predicted CLEAR positions agree with the true ones.",
            citation="",
            inputs_description=ClearMaskMetric.__doc__,
            features=datasets.Features({"predictions": masks, "references": masks}),
        )

    def _compute(self, predictions, references) -> dict[str, float | int | None]:
        pairs = zip(predictions, references)
        return aggregate_clear_metrics([clear_metrics(np.array(a, bool), np.array(b, bool)) for a, b in pairs])
