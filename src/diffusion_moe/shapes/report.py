"""Report on a model's images: the score of each GenEval category, with chance and the score of true images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from statistics import fmean
from typing import Any

from torch import Tensor

from ..randomness import derive_seed
from .detector import Detection, detect
from .prompts import CATEGORIES, SPLITS, Category, Prompt, Split, questions, true_scenes
from .rendering import render
from .scorer import ImageScore, find_errors, score_images

POOL = 120
"""Least number of true images for measuring the chance of a category."""


@dataclass(frozen=True)
class Tally:
    """Scores of one category and split."""

    n: int
    """Number of images."""
    score: float
    """Share of correct images."""
    chance: float
    """Share of correct images if each were a true image of a random prompt of the category, seen or held out: the score
    of a model that knows the category but does not read its prompt."""
    true: float
    """Share of correct images among true images of the same prompts: the scorer's own ceiling."""


@dataclass(frozen=True)
class ShapesReport:
    """Scores of one model."""

    tallies: dict[Category, dict[Split, Tally]]
    scores: tuple[ImageScore, ...]
    """Scores of the images, in the order of the prompts."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values: means over categories, overall and for each split, and the scores of every category."""
        categories = {
            category: {"overall": _pooled(list(splits.values()))} | {split: vars(t) for split, t in splits.items()}
            for category, splits in self.tallies.items()
        }
        means = {
            part: {
                key: fmean(row[part][key] for row in categories.values() if part in row)
                for key in ("score", "chance", "true")
            }
            for part in ("overall", *SPLITS)
            if any(part in row for row in categories.values())
        }
        return means | {"n": len(self.scores), "categories": categories}


def make_report(prompts: Sequence[Prompt], images: Tensor, seed: int = 0) -> ShapesReport:
    """Score images, one for each prompt.

    Args:
        images: (B, 3, H, W), [-1, 1].
        seed: of the true images and of those that measure chance.

    Raises:
        ValueError: there are no prompts, the numbers of images and prompts differ, or the images are not in colour.
    """
    if not prompts:
        raise ValueError("there are no prompts to score; give some")
    scores = score_images(prompts, images)
    size = min(images.shape[-2:])
    true = detect(render(true_scenes(prompts, seed), size))
    tallies: dict[Category, dict[Split, Tally]] = {}
    for category, split in product(CATEGORIES, SPLITS):
        some = [i for i, prompt in enumerate(prompts) if (prompt.category, prompt.split) == (category, split)]
        if some:
            asked, pool = [prompts[i].requirement for i in some], chance_pool(category, size, seed)
            tallies.setdefault(category, {})[split] = Tally(
                n=len(some),
                score=fmean(scores[i].correct for i in some),
                chance=fmean(not find_errors(r, found) for r, found in product(asked, pool)),
                true=fmean(not find_errors(r, true[i]) for i, r in zip(some, asked)),
            )
    return ShapesReport(tallies, tuple(scores))


@lru_cache(maxsize=len(CATEGORIES))  # both splits and every point of a sweep need the same
def chance_pool(category: Category, size: int, seed: int) -> list[list[Detection]]:
    """Detections in at least POOL true images of a category, the same number for each of its questions."""
    asked = [
        Prompt("", category, split, question.requirement) for split in SPLITS for question in questions(category, split)
    ]
    prompts = asked * math.ceil(POOL / len(asked))
    return detect(render(true_scenes(prompts, derive_seed(seed, f"shapes/chance/{category}")), size))


def _pooled(tallies: Sequence[Tally]) -> dict[str, float]:
    """Scores of both splits together, each image counted once."""
    n = sum(tally.n for tally in tallies)
    shares = {key: sum(t.n * getattr(t, key) for t in tallies) / n for key in ("score", "chance", "true")}
    return {"n": n, **shares}


def as_table(values: Mapping[str, Any]) -> str:
    """The values of `ShapesReport.as_dict` as a Markdown table."""
    rows = ["| category | split | n | score | chance | true images |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    parts = [(name, split, row) for name, splits in values["categories"].items() for split, row in splits.items()]
    parts += [("mean", part, values[part] | {"n": ""}) for part in ("overall", *SPLITS) if part in values]
    for name, split, row in parts:
        shares = (f"{row[key]:.1%}" for key in ("score", "chance", "true"))
        rows.append(f"| {name} | {split.replace('_', ' ')} | {row['n']} | {' | '.join(shares)} |")
    return "\n".join(rows)
