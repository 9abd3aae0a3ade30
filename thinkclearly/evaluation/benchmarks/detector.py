"""What GenEval looks with: a segmentation model that finds COCO's objects, and CLIP that names their colours.

Both are transformers' own. Knows nothing of prompts or of what should be there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

from thinkclearly.evaluation.benchmarks.geneval import CLASSES, COLOURS, THRESHOLD, Found
from thinkclearly.evaluation.benchmarks.towers import Clip

GREY = "#999"  # behind an object whose colour is named
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


class Detector:
    """Instance segmentation, float32.

    The benchmark's authors use mmdet's Mask2Former Swin-S; transformers' of the same architecture is other weights.

    Args:
        name: Hub id or folder of a model of universal segmentation over COCO's 80 classes, such as Mask2Former.

    Raises:
        ValueError: a model of other classes.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.model = AutoModelForUniversalSegmentation.from_pretrained(name, dtype=torch.float32).eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(name)
        labels = self.model.config.id2label
        if len(labels) != len(CLASSES) or (labels[0], labels[79]) != (CLASSES[0], CLASSES[79]):
            raise ValueError(
                f"{name} knows {len(labels)} classes, the first {labels[0]!r}; expected COCO's 80 in COCO's order, "
                "as facebook/mask2former-swin-small-coco-instance has them."
            )

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[list[Found]]:
        """Objects in RGB pictures of one size, with masks; none below `THRESHOLD`."""
        inputs = self.processor(list(pictures), return_tensors="pt").to(self.model.device)
        found = self.processor.post_process_instance_segmentation(
            self.model(**inputs),
            threshold=THRESHOLD,
            target_sizes=[picture.size[::-1] for picture in pictures],
            return_binary_maps=True,
        )
        return [
            [
                Found(CLASSES[info["label_id"]], info["score"], _box(mask), mask)
                for info, mask in zip(each["segments_info"], each["segmentation"].bool().cpu().numpy())
            ]
            for each in found
        ]


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Around a mask, bool (H, W), that is not empty: left, top, right, bottom; the last two are beyond it."""
    (rows,), (columns,) = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class ColourNamer:
    """CLIP as a classifier of `COLOURS`, without training: the nearest of what it makes of their names."""

    def __init__(self, clip: Clip):
        self.clip, self.classifiers = clip, {}

    def __call__(self, picture: Image.Image, found: Sequence[Found]) -> list[str]:
        """The colour of each of some objects of one class: masked with grey, cut out, and compared with words."""
        vectors = self.clip.images([cut_out(picture, each) for each in found])
        return [COLOURS[number] for number in (vectors @ self._classifier(found[0].name).T).argmax(-1)]

    def _classifier(self, name: str) -> torch.Tensor:
        """(colours, D): the mean over templates, as `clip_benchmark.metrics.zeroshot_classification` has it."""
        if name not in self.classifiers:
            texts = [template.format(colour, name) for colour in COLOURS for template in TEMPLATES]
            vectors = self.clip.texts(texts).view(len(COLOURS), len(TEMPLATES), -1)
            self.classifiers[name] = normalize(vectors.mean(1), dim=-1)
        return self.classifiers[name]


def cut_out(picture: Image.Image, found: Found) -> Image.Image:
    """An object's box of the picture, with grey where its mask is not."""
    grey = Image.new("RGB", picture.size, GREY)
    return Image.composite(picture, grey, Image.fromarray(found.mask)).crop(found.box)
