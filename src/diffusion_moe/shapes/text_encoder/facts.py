"""What the text encoder learns: what a caption says of each object that it names, at the word that names it.

Of "a red circle left of a square" the word "circle" has to tell: a circle, red, one of them, left of a square. The mean
over all words, which models take for the whole prompt, has to tell as much of the first object and of the second. The
words of training captions are sometimes unknown, so that each fact is learned from the words that say it and not from
the company they keep. Training shows only what scenes of the training split may show.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from ...randomness import derive_seed
from ..captions import MENTIONS, NUMBERS, PLURALS, Mention, describe
from ..scene import COLOURS, CONVERSE, RELATIONS, SHAPES, SIZES, Content, contents, held_out, seen_contents
from .tokenizer import UNKNOWN

NONE = "none"
"""What is not said."""
FACTS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "number": tuple(NUMBERS.values()),
    "size": (NONE, *SIZES),
    "colour": (NONE, *COLOURS),
    "relation": (NONE, *RELATIONS),
}
"""Of an object; the relation is its own to the other one."""
OBJECTS = 2
"""Most that a caption names; copies are one."""
IGNORED = -100
"""Class of a fact that cannot be known, and of words that name no object."""
MASKED = 0.15
"""Share of the shapes and colours of training captions that are unknown words."""

_SHAPE_OF = {shape: shape for shape in SHAPES} | {plural: shape for shape, plural in PLURALS.items()}


class Example(NamedTuple):
    """A caption by its words."""

    words: tuple[str, ...]
    facts: tuple[tuple[int, ...], ...]
    """Of each word: for each of FACTS the number of its value, or IGNORED."""
    objects: tuple[int, ...]
    """The same of the whole caption: the facts of the object named first, then of the second; `len(values)`: there is
    none."""


def training_examples(seed: int, step: int, count: int, masked: float = MASKED) -> list[Example]:
    """A function of (seed, step): single objects, counts and pairs equally often."""
    draw = random.Random(derive_seed(seed, "text/examples", step))
    kinds: dict[str, list[Content]] = {kind: [] for kind in MENTIONS}
    for content in seen_contents():
        kinds[content.kind].append(content)
    chosen = [draw.choice(kinds[draw.choice(list(kinds))]) for _ in range(count)]
    return [example(content, draw.choice(MENTIONS[content.kind]), draw, masked) for content in chosen]


def held_out_examples(seed: int) -> list[Example]:
    """Everything that is held out, said in every way of mentioning it that no seen content shares."""
    draw = random.Random(derive_seed(seed, "text/held-out"))
    said = {in_one_way(content, mention) for content in seen_contents() for mention in MENTIONS[content.kind]}
    fresh = {
        in_one_way(content, mention): (content, mention)
        for content in contents()
        if held_out(content)
        for mention in MENTIONS[content.kind]
    }
    return [example(*pair, draw) for text, pair in fresh.items() if text not in said]


def in_one_way(content: Content, mention: Mention) -> str:
    """The same text for contents of which the same is said."""
    return describe(content, mention, random.Random(0))


def example(content: Content, mention: Mention, draw: random.Random, masked: float = 0.0) -> Example:
    """A caption and its facts; the shape and the colour of each object are unknown words with probability `masked`."""
    words = describe(content, mention, draw).split(" ")
    maskable = [i for i, word in enumerate(words) if word in _SHAPE_OF or word in COLOURS]
    hidden = {i for i in maskable if draw.random() < masked}
    nouns = {_SHAPE_OF[word]: i for i, word in enumerate(words) if word in _SHAPE_OF}
    facts = [(IGNORED,) * len(FACTS)] * len(words)
    for shape, place in nouns.items():
        said = _facts(content, mention, shape)
        unknown = {"shape": place, "colour": place - 1}
        facts[place] = tuple(
            IGNORED if unknown.get(name) in hidden else values.index(said[name]) for name, values in FACTS.items()
        )
    named = [facts[place] for place in sorted(nouns.values())]
    named += [tuple(len(values) for values in FACTS.values())] * (OBJECTS - len(named))
    return Example(
        tuple(UNKNOWN if i in hidden else word for i, word in enumerate(words)), tuple(facts), tuple(chain(*named))
    )


def _facts(content: Content, mention: Mention, shape: str) -> dict[str, str]:
    """What a caption says of the object of a shape; the two of a pair differ in it."""
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
    """The captions as they are read."""
    return [" ".join(example.words) for example in examples]
