"""Prompts about coloured shapes in GenEval's categories, seen in training or held out, with what each requires."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..randomness import derive_seed
from .captions import Mention, describe
from .sampling import Scenes, arrange
from .scene import Axis, Colour, Content, Relation, Shape, Size, contents, held_out

Category = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
"""GenEval's tags (arXiv 2310.11513)."""
Split = Literal["seen", "held_out"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class RequiredObject:
    """Required objects of one shape; None allows any value."""

    shape: Shape
    count: int = 1
    colour: Colour | None = None
    size: Size | None = None


@dataclass(frozen=True)
class Requirement:
    """Exactly these objects and no others."""

    wanted: tuple[RequiredObject, ...]
    relation: Relation | None = None
    """Position of the first, seen from the second."""


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    text: str
    category: Category
    split: Split
    requirement: Requirement

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class _Rule(NamedTuple):
    """Prompts of one category."""

    kind: str
    mentions: tuple[Mention, ...]
    """Facts that its texts may mention; they require all of them."""
    axis: Axis
    """The one axis along which its held-out contents are held out."""


_RULES: dict[Category, _Rule] = {
    "single_object": _Rule("single", (Mention(), Mention(size=True)), "size"),
    "two_object": _Rule("pair", (Mention(),), "pair"),
    "counting": _Rule("count", (Mention(),), "count"),
    "colors": _Rule("single", (Mention(colour=True),), "look"),
    "position": _Rule("pair", (Mention(relation=True),), "relation"),
    "color_attr": _Rule("pair", (Mention(colour=True),), "look"),
}


def requirement_of(content: Content, mention: Mention) -> Requirement:
    """Requirement of a text that mentions so much of a content."""
    wanted = tuple(
        RequiredObject(look.shape, count, look.colour if mention.colour else None, look.size if mention.size else None)
        for look, count in Counter(content.looks).items()
    )
    return Requirement(wanted, content.relation if mention.relation else None)


class Question(NamedTuple):
    """A requirement, its mention, and the contents (rows of `contents()`) that fulfil it."""

    requirement: Requirement
    mention: Mention
    rows: tuple[int, ...]


@lru_cache
def questions(category: Category, split: Split) -> tuple[Question, ...]:
    """All questions of a category; every content that fulfils a held-out question is held out."""
    rule = _RULES[category]
    axes = frozenset() if split == "seen" else frozenset({rule.axis})
    answers: dict[tuple[Requirement, Mention], list[int]] = {}
    for number, content in enumerate(contents()):
        if content.kind == rule.kind:
            for mention in rule.mentions:
                answers.setdefault((requirement_of(content, mention), mention), []).append(number)
    found = []
    for (requirement, mention), numbers in answers.items():
        fitting = tuple(number for number in numbers if held_out(contents()[number]) == axes)
        trained = any(not held_out(contents()[number]) for number in numbers)
        if fitting and trained == (split == "seen"):
            found.append(Question(requirement, mention, fitting))
    return tuple(found)


def evaluation_prompts(seed: int, per_category: int, split: Split) -> list[Prompt]:
    """Prompts of every category, spread evenly over its questions; a function of the arguments.

    Raises:
        ValueError: `per_category` is not positive.
    """
    if per_category < 1:
        raise ValueError(f"per_category is {per_category}; it must be positive")
    prompts = []
    for category in CATEGORIES:
        asked = questions(category, split)
        for number in range(per_category):
            cycle, index = divmod(number, len(asked))
            order = list(range(len(asked)))
            random.Random(derive_seed(seed, f"shapes/questions/{category}/{split}", cycle)).shuffle(order)
            question = asked[order[index]]
            rng = random.Random(derive_seed(seed, f"shapes/prompts/{category}/{split}", number))
            text = describe(contents()[rng.choice(question.rows)], question.mention, rng)
            prompts.append(Prompt(text, category, split, question.requirement))
    return prompts


def true_scenes(prompts: Sequence[Prompt], seed: int) -> Scenes:
    """A scene that fulfils each prompt.

    Raises:
        ValueError: a prompt's requirement is not of its category.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        fitting = [q.rows for q in questions(prompt.category, prompt.split) if q.requirement == prompt.requirement]
        if not fitting:
            raise ValueError(f"the prompt {prompt.text!r} asks for nothing of the category {prompt.category}")
        rows.append(random.Random(derive_seed(seed, "shapes/true", number)).choice(fitting[0]))
    return arrange(torch.tensor(rows), seed, "shapes/true", torch.arange(len(prompts)))
