"""Training data of the text encoder: what a caption says of each object, to be predicted at the word that names it.

In "a red circle left of a square", the features of "circle" must predict: a circle, red, one of them, left of a square.
The mean over all words, which models use for the whole prompt, must predict the same of both objects. Some words of
training captions are unknown, so that each fact is learned from the words that say it and not from their neighbours.
Training uses only contents of the training split.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from ...randomness import derive_seed
from ..captions import MENTIONS, NUMBERS, PLURALS, Mention, describe
from ..scene import COLOURS, CONVERSE, RELATIONS, SHAPES, SIZES, Content, contents, held_out, seen_contents

UNKNOWN = "<unk>"
"""The word that stands for unknown ones."""
NONE = "none"
"""Value of a fact that is not mentioned."""
FACTS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "number": tuple(NUMBERS.values()),
    "size": (NONE, *SIZES),
    "colour": (NONE, *COLOURS),
    "relation": (NONE, *RELATIONS),
}
"""Facts of an object and their values; the relation is that to the other object."""
OBJECTS = 2
"""Most objects that a caption names; copies count as one."""
IGNORED = -100
"""Class of unknown facts, and of words that do not name an object."""
MASKED = 0.15
"""Share of shapes and colours that are replaced by unknown words in training captions."""

_SHAPE_OF = {shape: shape for shape in SHAPES} | {plural: shape for shape, plural in PLURALS.items()}


class Example(NamedTuple):
    """A caption and its facts."""

    words: tuple[str, ...]
    facts: tuple[tuple[int, ...], ...]
    """Facts of each word: for each of FACTS the index of its value, or IGNORED."""
    objects: tuple[int, ...]
    """Facts of the whole caption: those of the first object, then of the second; `len(values)` if there is none."""


def training_examples(seed: int, step: int, count: int, masked: float = MASKED) -> list[Example]:
    """Examples as a function of (seed, step): single objects, counts and pairs equally often."""
    rng = random.Random(derive_seed(seed, "text/examples", step))
    kinds = {kind: [content for content in seen_contents() if content.kind == kind] for kind in MENTIONS}
    chosen = [rng.choice(kinds[rng.choice(list(kinds))]) for _ in range(count)]
    return [example(content, rng.choice(MENTIONS[content.kind]), rng, masked) for content in chosen]


def held_out_examples(seed: int) -> list[Example]:
    """Examples of all held-out contents, with every mention whose text no seen content shares."""
    rng = random.Random(derive_seed(seed, "text/held-out"))
    said = {in_one_way(content, mention) for content in seen_contents() for mention in MENTIONS[content.kind]}
    fresh = {
        in_one_way(content, mention): (content, mention)
        for content in contents()
        if held_out(content)
        for mention in MENTIONS[content.kind]
    }
    return [example(*pair, rng) for text, pair in fresh.items() if text not in said]


def in_one_way(content: Content, mention: Mention) -> str:
    """A text that is equal for contents of which the same is mentioned."""
    return describe(content, mention, random.Random(0))


def example(content: Content, mention: Mention, rng: random.Random, masked: float = 0.0) -> Example:
    """A caption and its facts; shapes and colours are replaced by unknown words with probability `masked`."""
    words = describe(content, mention, rng).split(" ")
    maskable = [i for i, word in enumerate(words) if word in _SHAPE_OF or word in COLOURS]
    hidden = {i for i in maskable if rng.random() < masked}
    nouns = {_SHAPE_OF[word]: i for i, word in enumerate(words) if word in _SHAPE_OF}
    facts = [(IGNORED,) * len(FACTS)] * len(words)
    for shape, position in nouns.items():
        said = _facts(content, mention, shape)
        unknown = {"shape": position, "colour": position - 1}
        facts[position] = tuple(
            IGNORED if unknown.get(name) in hidden else values.index(said[name]) for name, values in FACTS.items()
        )
    named = [facts[position] for position in sorted(nouns.values())]
    named += [tuple(len(values) for values in FACTS.values())] * (OBJECTS - len(named))
    return Example(
        tuple(UNKNOWN if i in hidden else word for i, word in enumerate(words)), tuple(facts), tuple(chain(*named))
    )


def _facts(content: Content, mention: Mention, shape: str) -> dict[str, str]:
    """Facts that a caption mentions of the object of a shape; the two of a pair differ in shape."""
    (own,) = {look for look in content.looks if look.shape == shape}
    relation = content.relation if mention.relation else None
    if relation is not None and own != content.looks[0]:
        relation = CONVERSE[relation]
    return {
        "shape": own.shape,
        "number": NUMBERS[sum(look.shape == shape for look in content.looks)],
        "size": own.size if mention.size else NONE,
        "colour": own.colour if mention.colour else NONE,
        "relation": relation or NONE,
    }


def texts(examples: Sequence[Example]) -> list[str]:
    """The captions as text."""
    return [" ".join(example.words) for example in examples]
