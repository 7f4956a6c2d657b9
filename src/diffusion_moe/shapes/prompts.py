"""What a model is asked to draw: GenEval's categories over coloured shapes, seen in training or held out.

A prompt carries what it requires as a value; nobody has to read it from the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..randomness import derive_seed
from .captions import Mention, describe
from .sampling import Scenes, place
from .scene import Axis, Colour, Content, Relation, Shape, Size, contents, held_out

Category = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
"""By GenEval's tags (arXiv 2310.11513)."""
Split = Literal["seen", "held_out"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Wanted:
    """Objects of one shape that must be there; what is None may be anything."""

    shape: Shape
    count: int = 1
    colour: Colour | None = None
    size: Size | None = None


@dataclass(frozen=True)
class Requirement:
    """These objects and no others."""

    wanted: tuple[Wanted, ...]
    relation: Relation | None = None
    """Where the first stands, seen from the second."""


@dataclass(frozen=True)
class Prompt:
    """One thing to draw."""

    text: str
    category: Category
    split: Split
    requirement: Requirement

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class _Row(NamedTuple):
    """One row of the table of categories."""

    kind: str
    mentions: tuple[Mention, ...]
    """What its texts may say; all of them require what they say."""
    axis: Axis
    """Along which its held-out contents are held out, and along no other."""


_TABLE: dict[Category, _Row] = {
    "single_object": _Row("single", (Mention(), Mention(size=True)), "size"),
    "two_object": _Row("pair", (Mention(),), "pair"),
    "counting": _Row("count", (Mention(),), "count"),
    "colors": _Row("single", (Mention(colour=True),), "look"),
    "position": _Row("pair", (Mention(relation=True),), "relation"),
    "color_attr": _Row("pair", (Mention(colour=True),), "look"),
}


def requirement_of(content: Content, mention: Mention) -> Requirement:
    """What a text requires that says so much of a content."""
    looks = content.looks[:1] if content.kind == "count" else content.looks
    wanted = (
        Wanted(
            look.shape,
            len(content.looks) if content.kind == "count" else 1,
            look.colour if mention.colour else None,
            look.size if mention.size else None,
        )
        for look in looks
    )
    return Requirement(tuple(wanted), content.relation if mention.relation else None)


class Question(NamedTuple):
    """A requirement, the mention that says it, and the contents (rows of `contents()`) that fulfil it."""

    requirement: Requirement
    mention: Mention
    rows: tuple[int, ...]


@lru_cache
def questions(category: Category, split: Split) -> tuple[Question, ...]:
    """All that can be asked; of a held-out question, every content that fulfils it is held out."""
    row = _TABLE[category]
    axes = frozenset() if split == "seen" else frozenset({row.axis})
    answers: dict[tuple[Requirement, Mention], list[int]] = {}
    for number, content in enumerate(contents()):
        if content.kind == row.kind:
            for mention in row.mentions:
                answers.setdefault((requirement_of(content, mention), mention), []).append(number)
    found = []
    for (requirement, mention), numbers in answers.items():
        fitting = tuple(number for number in numbers if held_out(contents()[number]) == axes)
        trained = any(not held_out(contents()[number]) for number in numbers)
        if fitting and trained == (split == "seen"):
            found.append(Question(requirement, mention, fitting))
    return tuple(found)


def evaluation_prompts(seed: int, per_category: int, split: Split) -> list[Prompt]:
    """Prompts of every category, as evenly over its questions as their number allows; a function of the arguments.

    Raises:
        ValueError: there are to be none.
    """
    if per_category < 1:
        raise ValueError(f"per_category is {per_category}; it must be positive")
    prompts = []
    for category in CATEGORIES:
        asked = questions(category, split)
        for number in range(per_category):
            cycle, place_in_cycle = divmod(number, len(asked))
            order = list(range(len(asked)))
            random.Random(derive_seed(seed, f"shapes/questions/{category}/{split}", cycle)).shuffle(order)
            question = asked[order[place_in_cycle]]
            draw = random.Random(derive_seed(seed, f"shapes/prompts/{category}/{split}", number))
            text = describe(contents()[draw.choice(question.rows)], question.mention, draw)
            prompts.append(Prompt(text, category, split, question.requirement))
    return prompts


def true_scenes(prompts: Sequence[Prompt], seed: int) -> Scenes:
    """A scene that each prompt truly describes; held-out ones show what training never does."""
    rows = []
    for number, prompt in enumerate(prompts):
        fitting = [q.rows for q in questions(prompt.category, prompt.split) if q.requirement == prompt.requirement]
        if not fitting:
            raise ValueError(f"the prompt {prompt.text!r} asks for nothing of the category {prompt.category}")
        rows.append(random.Random(derive_seed(seed, "shapes/true", number)).choice(fitting[0]))
    return place(torch.tensor(rows), seed, "shapes/true", torch.arange(len(prompts)))
