"""Prompts and scorer of coloured shapes: geometry reads the objects back out of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product

import torch
from PIL import Image
from torch import Tensor

from ..log import Log
from ..sampling.loading import load_text_encoder
from ..sampling.sampler import Sampler
from ..shapes.gallery import make_gallery
from ..shapes.prompts import CATEGORIES, SPLITS, Prompt, evaluation_prompts
from ..shapes.report import as_table, make_report
from ..shapes.scorer import score_images
from ..text import TextEncoder
from .extract_features import Features
from .features import Extractor, ExtractorIdentity, digest_of
from .options import TextOptions
from .prompts import Once, Texts
from .report import Result
from .scorer import Scorer

VERSION = "1"
"""Version of the scorer: raise it when other images would count as right, so that scores do not mix."""
GALLERY_COLUMNS = 6
"""Images of each category and split in the gallery, a row."""
GROUPS = tuple(product(SPLITS, CATEGORIES))


class Questions(Texts):
    """Prompts about coloured shapes, whose images can be scored."""

    def __init__(self, prompts: Sequence[Prompt], origin: str, encoder: TextEncoder) -> None:
        super().__init__([prompt.text for prompt in prompts], origin, encoder)
        self.prompts = list(prompts)
        self.sha256 = digest_of([prompt.as_dict() for prompt in prompts])


def shape_questions(sampler: Sampler, options: TextOptions, log: Log) -> Questions:
    """Questions for a run on coloured shapes: as many of each category, seen and held out; the seen ones first.

    Raises:
        ValueError: prompts are given, their number is not a multiple of the groups, or the encoder cannot be loaded.
    """
    if options.prompts is not None:
        raise ValueError(
            f"prompts is {options.prompts}, but coloured shapes are scored by questions of their own; remove the "
            "option, or give --reference FILE to compare features instead"
        )
    count, seed = sampler.settings.num_samples, sampler.settings.seed
    each, rest = divmod(count, len(GROUPS))
    if rest or not each:
        near = " or ".join(str(n * len(GROUPS)) for n in (each, each + 1) if n)
        raise ValueError(
            f"num_samples is {count}, but prompts of coloured shapes are of {len(CATEGORIES)} categories, seen "
            f"and held out, as many each; give a multiple of {len(GROUPS)}, as {near}"
        )
    prompts = [prompt for split in SPLITS for prompt in evaluation_prompts(seed, each, split)]
    origin = f"coloured shapes, {each} of each category and split, seed {seed}"
    return Questions(prompts, origin, load_text_encoder(sampler.source, options.text_encoder, Once(log)))


class Pixels(Extractor):
    """`pool` (S, C * H * W): the pixels themselves, uint8."""

    channels = 3
    identity = ExtractorIdentity("shapes scorer", VERSION, "none", "pixels")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return self.extract(images)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return {"pool": images.cpu().flatten(1)}


@dataclass(frozen=True)
class ShapesScorer(Scorer):
    """Scores images by whether they show what their prompts ask for."""

    questions: Questions
    image_size: tuple[int, int]
    seed: int
    """Seed of the true images, and of those that measure chance."""
    extractor: Extractor = field(default_factory=Pixels)

    @property
    def reference_sha256(self) -> str:
        return self.questions.sha256

    def scores(self, features: Features, labels: Tensor | None) -> Result:
        """The report of `shapes.report.make_report`, and what every file of scores has.

        Raises:
            ValueError: the images are not in colour.
        """
        report = make_report(self.questions.prompts, self._images(features), self.seed)
        return report.as_dict() | {
            "num_samples": len(self.questions),
            "extractor": asdict(self.extractor.identity),
            "reference": {"name": "true images of the same prompts", "sha256": self.questions.sha256},
            "images_sha256": features.images_sha256,
            "seconds_per_image": features.seconds_per_image,
            "warnings": [],
        }

    def table(self, result: Result) -> list[str]:
        """A line a category and split."""
        return as_table(result).splitlines()

    def gallery(self, features: Features) -> Image.Image:
        """A row of images for each category, seen and held out."""
        rows = first_of_each(self.questions.prompts)
        prompts, images = [self.questions.prompts[i] for i in rows], self._images(features)[rows]
        return make_gallery(prompts, images, score_images(prompts, images), columns=GALLERY_COLUMNS)

    def _images(self, features: Features) -> Tensor:
        """NCHW, [-1, 1]."""
        height, width = self.image_size
        return features.pool_SD.view(len(self.questions), -1, height, width) / 127.5 - 1


def first_of_each(prompts: Sequence[Prompt]) -> list[int]:
    """Indices of the first prompts of each category, its held-out ones after its seen ones."""
    members: dict[tuple[str, str], list[int]] = {group: [] for group in product(CATEGORIES, SPLITS)}
    for i, prompt in enumerate(prompts):
        members[prompt.category, prompt.split].append(i)
    return [i for indices in members.values() for i in indices[:GALLERY_COLUMNS]]


def questions_in_turn(count: int, seed: int) -> list[Prompt]:
    """Questions for an analysis: one of each seen category and one of each held-out category in turn."""
    C = len(CATEGORIES)
    each = -(-count // (len(SPLITS) * C))
    prompts = {split: evaluation_prompts(seed, each, split) for split in SPLITS}  # category by category
    return [prompts[split][c * each + i] for i in range(each) for split in SPLITS for c in range(C)][:count]
