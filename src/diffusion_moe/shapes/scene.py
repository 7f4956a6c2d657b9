"""The world of coloured shapes: possible contents of a scene, and combinations held out from training."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations, product
from typing import Literal

Shape = Literal["circle", "square", "triangle", "cross"]
Colour = Literal["red", "yellow", "green", "blue", "purple", "white"]
Size = Literal["small", "large"]
Relation = Literal["left of", "right of", "above", "below"]
Axis = Literal["look", "size", "count", "pair", "relation"]
"""Axis along which something is held out; a look is a shape in a colour."""

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "cross")
COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (226, 53, 48),
    "yellow": (250, 208, 44),
    "green": (38, 176, 84),
    "blue": (44, 110, 245),
    "purple": (190, 62, 214),
    "white": (246, 246, 246),
}
"""sRGB, 0 to 255. Their directions from the background are far apart, so edges mixed with it keep their colour."""
BACKGROUND = (28, 30, 38)
"""Background of every scene; sRGB, 0 to 255."""
SIZES: dict[Size, tuple[float, float]] = {"small": (0.135, 0.165), "large": (0.22, 0.27)}
"""Least and greatest radius, as a share of the image's side."""
LARGE_FROM = 0.19
"""Radius from which an object is called large: midway between the sizes."""
RELATIONS: dict[Relation, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction from the second object to the first, (x, y); y runs downwards."""
CONVERSE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MAX_COUNT = 4

HELD_OUT_LOOKS: Set[tuple[Shape, Colour]] = {
    ("circle", "purple"),
    ("circle", "yellow"),
    ("square", "green"),
    ("triangle", "red"),
    ("triangle", "white"),
    ("cross", "blue"),
}
"""Each colour lacks one shape."""
HELD_OUT_SIZES: Set[tuple[Shape, Size]] = {("cross", "large")}
HELD_OUT_COUNTS: Set[tuple[int, Shape]] = {(2, "triangle"), (3, "square"), (4, "circle")}
"""Each count lacks one shape."""
HELD_OUT_PAIRS: Set[Set[Shape]] = {frozenset({"circle", "cross"}), frozenset({"square", "triangle"})}
"""Shapes never seen together."""
HELD_OUT_RELATIONS: Set[tuple[Shape, Relation, Shape]] = {
    ("circle", "left of", "square"),
    ("square", "above", "cross"),
    ("cross", "right of", "triangle"),
    ("triangle", "below", "circle"),
}
"""Each pair of shapes that is seen together lacks one relation; the converse says the same."""
_HELD_OUT_EITHER_WAY = HELD_OUT_RELATIONS | {(b, CONVERSE[relation], a) for a, relation, b in HELD_OUT_RELATIONS}


@dataclass(frozen=True)
class Look:
    """A shape in a colour and a size."""

    shape: Shape
    colour: Colour
    size: Size = "small"


@dataclass(frozen=True)
class Content:
    """Contents of a scene without positions: one object, copies of one, or two that differ in shape and colour."""

    looks: tuple[Look, ...]
    relation: Relation | None = None
    """Position of the first of two different objects, seen from the second."""

    @property
    def kind(self) -> Literal["single", "count", "pair"]:
        if len(self.looks) == 1:
            return "single"
        return "pair" if self.relation else "count"


def size_of(radius: float) -> Size:
    """The word for a radius."""
    return "large" if radius >= LARGE_FROM else "small"


def relation_holds(first: tuple[float, float], relation: Relation, second: tuple[float, float]) -> bool:
    """True if the first centre is within 60 degrees of the relation's direction from the second; (x, y) each.

    The cone is GenEval's (arXiv 2310.11513): the offset along the direction exceeds half of the distance.
    """
    dx, dy = first[0] - second[0], first[1] - second[1]
    x, y = RELATIONS[relation]
    return x * dx + y * dy > 0.5 * math.hypot(dx, dy)


def held_out(content: Content) -> frozenset[Axis]:
    """Axes along which a content is held out; training shows only contents without any."""
    shapes = [look.shape for look in content.looks]
    axes: dict[Axis, bool] = {
        "look": any((look.shape, look.colour) in HELD_OUT_LOOKS for look in content.looks),
        "size": any((look.shape, look.size) in HELD_OUT_SIZES for look in content.looks),
        "count": content.kind == "count" and (len(shapes), shapes[0]) in HELD_OUT_COUNTS,
        "pair": frozenset(shapes) in HELD_OUT_PAIRS,
        "relation": (shapes[0], content.relation, shapes[-1]) in _HELD_OUT_EITHER_WAY,
    }
    return frozenset(axis for axis, holds in axes.items() if holds)


@lru_cache
def contents() -> tuple[Content, ...]:
    """All possible contents: 48 single objects, 72 counts, 720 pairs."""
    looks = list(product(SHAPES, COLOURS))
    single = [Content((Look(shape, colour, size),)) for size in SIZES for shape, colour in looks]
    counts = [Content((Look(*look),) * count) for count in range(2, MAX_COUNT + 1) for look in looks]
    pairs = [
        Content((Look(shapes[0], colours[0]), Look(shapes[1], colours[1])), relation)
        for shapes in combinations(SHAPES, 2)
        for colours in permutations(COLOURS, 2)
        for relation in RELATIONS
    ]
    return (*single, *counts, *pairs)


@lru_cache
def seen_contents() -> tuple[Content, ...]:
    """Contents that training may show."""
    return tuple(content for content in contents() if not held_out(content))
