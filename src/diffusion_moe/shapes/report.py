"""The score of a model's images: GenEval's categories, each beside its chance and beside that of true images."""

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
from .detector import Found, parse
from .prompts import CATEGORIES, SPLITS, Category, Prompt, Split, questions, true_scenes
from .rendering import render
from .scorer import Verdict, complaints, judge_all

POOL = 120
"""Least number of true images of a category that chance is measured on."""


@dataclass(frozen=True)
class Tally:
    """Of one category and split."""

    n: int
    """Images."""
    score: float
    """Share of them that is right."""
    chance: float
    """Share that would be right of true images of random prompts of the category, seen and held out alike: of a model
    that draws what is asked for in the category but does not read its prompt."""
    true: float
    """Share that is right of true images, drawn for the same prompts: what the scorer itself can do."""


@dataclass(frozen=True)
class Report:
    """Of one model."""

    tallies: dict[Category, dict[Split, Tally]]
    verdicts: tuple[Verdict, ...]
    """In the order of the prompts."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values: overall and for each split the mean over categories, then every category."""
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
        return means | {"n": len(self.verdicts), "categories": categories}


def score(prompts: Sequence[Prompt], images: Tensor, seed: int = 0) -> Report:
    """Scorer images, one for each prompt.

    Args:
        images: (B, 3, H, W), [-1, 1]. seed: of the true images and of the pairs that measure chance.

    Raises:
        ValueError: there are no prompts, not as many images, or they are no colour images.
    """
    if not prompts:
        raise ValueError("there are no prompts to score; give some")
    verdicts = judge_all(prompts, images)
    size = min(images.shape[-2:])
    true = parse(render(true_scenes(prompts, seed), size))
    tallies: dict[Category, dict[Split, Tally]] = {}
    for category in CATEGORIES:
        members = [i for i, prompt in enumerate(prompts) if prompt.category == category]
        pool = chance_pool(category, size, seed) if members else []
        for split in SPLITS:
            some = [i for i in members if prompts[i].split == split]
            asked = [prompts[i].requirement for i in some]
            if some:
                tallies.setdefault(category, {})[split] = Tally(
                    n=len(some),
                    score=fmean(verdicts[i].correct for i in some),
                    chance=fmean(not complaints(r, found) for r, found in product(asked, pool)),
                    true=fmean(not complaints(r, true[i]) for i, r in zip(some, asked)),
                )
    return Report(tallies, tuple(verdicts))


@lru_cache(maxsize=len(CATEGORIES))  # a sweep asks for the same at every point
def chance_pool(category: Category, size: int, seed: int) -> list[list[Found]]:
    """What is found in at least POOL true images of a category: of each of its questions, seen or held out, as many."""
    asked = [
        Prompt("", category, split, question.requirement) for split in SPLITS for question in questions(category, split)
    ]
    prompts = asked * math.ceil(POOL / len(asked))
    return parse(render(true_scenes(prompts, derive_seed(seed, f"shapes/chance/{category}")), size))


def _pooled(tallies: Sequence[Tally]) -> dict[str, float]:
    """Of both splits together, each image counted once."""
    n = sum(tally.n for tally in tallies)
    shares = {key: sum(t.n * getattr(t, key) for t in tallies) / n for key in ("score", "chance", "true")}
    return {"n": n, **shares}


def table(report: Report) -> str:
    """The report as a Markdown table."""
    return as_table(report.as_dict())


def as_table(values: Mapping[str, Any]) -> str:
    """The same of `Report.as_dict`'s values."""
    rows = ["| category | split | n | score | chance | true images |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    parts = [(name, split, row) for name, splits in values["categories"].items() for split, row in splits.items()]
    parts += [("mean", part, values[part] | {"n": ""}) for part in ("overall", *SPLITS) if part in values]
    for name, split, row in parts:
        shares = (f"{row[key]:.1%}" for key in ("score", "chance", "true"))
        rows.append(f"| {name} | {split.replace('_', ' ')} | {row['n']} | {' | '.join(shares)} |")
    return "\n".join(rows)
