"""Captions of scenes by a small grammar of 33 words."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..randomness import derive_seed
from .scene import COLOURS, CONVERSE, RELATIONS, SHAPES, SIZES, Content, Look, Relation

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
FRAMES = ("{}", "a picture of {}", "there {verb} {}")
"""Sentences around the objects."""

WORDS: tuple[str, ...] = tuple(
    sorted(
        {*SHAPES, *PLURALS.values(), *COLOURS, *SIZES, *NUMBERS.values()}
        | {word for phrases in PHRASES.values() for phrase in phrases for word in phrase.split()}
        | {"a", "and", "are", "is", "of", "picture", "there"}
    )
)
"""Every word of every caption, in lower case; captions are these words and single spaces."""


@dataclass(frozen=True)
class Mention:
    """Facts that a caption mentions in addition to shapes and counts."""

    colour: bool = False
    size: bool = False
    relation: bool = False


MENTIONS: dict[str, tuple[Mention, ...]] = {
    "single": (Mention(), Mention(colour=True), Mention(size=True), Mention(colour=True, size=True)),
    "count": (Mention(), Mention(colour=True)),
    "pair": (Mention(), Mention(colour=True), Mention(relation=True), Mention(colour=True, relation=True)),
}
"""Mentions of each kind of content; a scene's captions use them in turn."""


def describe(content: Content, mention: Mention, rng: random.Random) -> str:
    """One caption. `rng` chooses the phrasing, and which of two objects is named first."""
    looks, first = content.looks, content.looks[0]
    if content.kind == "count":
        objects = f"{NUMBERS[len(looks)]} {_name(first, mention, plural=True)}"
    elif content.kind == "single":
        objects = f"{rng.choice(('a', 'a', 'one'))} {_name(first, mention)}"
    else:
        relation, pair = content.relation, [_name(look, mention) for look in looks]
        assert relation in RELATIONS
        if rng.random() < 0.5:
            relation, pair = CONVERSE[relation], pair[::-1]
        between = rng.choice(PHRASES[relation]) if mention.relation else "and"
        objects = f"a {pair[0]} {between} a {pair[1]}"
    verb = "are" if content.kind == "count" else "is"
    return rng.choice(FRAMES).format(objects, verb=verb)


def caption(content: Content, seed: int, stream: str, index: int, number: int) -> str:
    """Caption `number` of scene `index`: a function of its content and (seed, stream, index, number) alone."""
    mentions = MENTIONS[content.kind]
    rng = random.Random(derive_seed(seed, f"{stream}/caption/{number}", index))
    return describe(content, mentions[number % len(mentions)], rng)


def _name(look: Look, mention: Mention, plural: bool = False) -> str:
    size = f"{look.size} " if mention.size else ""
    colour = f"{look.colour} " if mention.colour else ""
    return size + colour + (PLURALS[look.shape] if plural else look.shape)
