"""The judge of coloured shapes: geometry reads the objects back out of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..shapes.gallery import make_gallery
from ..shapes.prompts import CATEGORIES, SPLITS, Prompt, evaluation_prompts
from ..shapes.report import make_report
from ..shapes.scorer import score_images
from .extract_features import Features
from .features import Extractor, ExtractorIdentity
from .prompts import Questions
from .scorer import Scorer

SCORER = "1"
"""To be raised when other images would count as right, so that scores do not mix."""
SHOWN_EACH = 6
"""Images of each category and split in the picture, a row."""


class Pixels(Extractor):
    """`pool` (S, C * H * W): the pixels themselves, uint8."""

    channels = 3
    identity = ExtractorIdentity("shapes scorer", SCORER, "none", "pixels")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return self.extract(images)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return {"pool": images.cpu().flatten(1)}


@dataclass(frozen=True)
class ShapesScorer(Scorer):
    """Whether each image shows what its prompt asks for."""

    asked: Questions
    image_size: tuple[int, int]
    seed: int
    """Of the true images, and of those that measure chance."""
    extractor: Extractor = field(default_factory=Pixels)

    @property
    def reference_sha256(self) -> str:
        return self.asked.sha256

    def scores(self, found: Features, labels: Tensor | None) -> dict[str, Any]:
        """The report of `shapes.score`, and what every record has.

        Raises:
            ValueError: the images are not in colour.
        """
        report = make_report(self.asked.prompts, self._images(found), self.seed)
        return report.as_dict() | {
            "num_samples": len(self.asked),
            "extractor": asdict(self.extractor.identity),
            "reference": {"name": "true images of the same prompts", "sha256": self.asked.sha256},
            "images_sha256": found.images_sha256,
            "seconds_per_image": found.seconds_per_image,
            "warnings": [],
        }

    def picture(self, found: Features) -> Image.Image:
        """A row of images for each category, seen and held out."""
        places = first_of_each(self.asked.prompts)
        prompts, images = [self.asked.prompts[i] for i in places], self._images(found)[places]
        return make_gallery(prompts, images, score_images(prompts, images), columns=SHOWN_EACH)

    def _images(self, found: Features) -> Tensor:
        """NCHW, [-1, 1]."""
        height, width = self.image_size
        return found.pool_SD.view(len(self.asked), -1, height, width) / 127.5 - 1


def first_of_each(prompts: Sequence[Prompt]) -> list[int]:
    """Places of the first prompts of each category, its held-out ones below its seen ones."""
    places = []
    for category in CATEGORIES:
        for split in SPLITS:
            members = [i for i, p in enumerate(prompts) if (p.category, p.split) == (category, split)]
            places += members[:SHOWN_EACH]
    return places


def questions_in_turn(count: int, seed: int) -> list[Prompt]:
    """Questions for an analysis: one of each seen category and one of each held-out category in turn."""
    C = len(CATEGORIES)
    each = -(-count // (len(SPLITS) * C))
    found = {split: evaluation_prompts(seed, each, split) for split in SPLITS}  # category by category
    return [found[split][c * each + i] for i in range(each) for split in SPLITS for c in range(C)][:count]
