"""Sampling scenes: contents and positions, each a function of (seed, stream, scene number) alone.

Shapes: S scenes, I = 4 objects at most, the first ones of a scene are used; R = 2 rows of C = 2 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import ShapesLayout
from ..randomness import uniforms
from .scene import COLOURS, LARGE_FROM, RELATIONS, SHAPES, SIZES, Look, contents, held_out

EDGE, GAP = 1 / 32, 0.07
"""Least distance of an object's box to the image's edge and to another box, as a share of the side."""
REACH = {"circle": 1.0, "square": 0.88, "triangle": 1.2, "cross": 1.05}
"""Greatest distance from the centroid along x or y, for a shape of radius 1."""
GRID = (1 / 4, 1 / 8)
"""Step of the layout grid for small and large objects; centres are at most one step from the middle along x and y."""
SLOPE = 0.5
"""Greatest offset of two related objects across the relation's direction, over the offset along it."""
KIND_SHARES = {"single": 0.2, "count": 0.2, "pair": 0.6}
"""Shares of the training scenes."""


@dataclass(frozen=True)
class Scenes:
    """Many scenes as tensors, (S, I) each; missing objects have radius 0."""

    shape: Tensor
    """Index into SHAPES, int64."""
    colour: Tensor
    """Index into COLOURS, int64."""
    x: Tensor
    """Position of the centroid as a share of the image's side, float32; y runs downwards, and radius is a share too."""
    y: Tensor
    radius: Tensor

    def __len__(self) -> int:
        return len(self.shape)


class _Table(NamedTuple):
    """`contents()` as tensors, a row each; missing objects are 0."""

    shape: Tensor
    """Index into SHAPES, (840, I)."""
    colour: Tensor
    """Index into COLOURS, (840, I)."""
    radii: Tensor
    """Least and greatest radius, (840, I, 2)."""
    direction: Tensor
    """Direction of the relation, (840, 2); 0 without one."""


@lru_cache
def _table() -> _Table:
    def padded(values: Callable[[Look], Any]) -> Tensor:
        rows = [torch.tensor([values(look) for look in content.looks]) for content in contents()]
        return pad_sequence(rows, batch_first=True)

    return _Table(
        shape=padded(lambda look: SHAPES.index(look.shape)),
        colour=padded(lambda look: list(COLOURS).index(look.colour)),
        radii=padded(lambda look: SIZES[look.size]),
        direction=torch.tensor([RELATIONS[content.relation] if content.relation else (0, 0) for content in contents()]),
    )


@lru_cache
def _seen_rows() -> list[Tensor]:
    """Rows of `contents()` that training shows, a tensor for each of KIND_SHARES."""
    return [
        torch.tensor([row for row, content in enumerate(contents()) if content.kind == kind and not held_out(content)])
        for kind in KIND_SHARES
    ]


def sample_contents(seed: int, stream: str, numbers: Tensor) -> Tensor:
    """Contents of training scenes as rows of `contents()`: a kind by KIND_SHARES, then any that is not held out.

    Args:
        seed: of the randomness.
        stream: name of the random numbers.
        numbers: numbers of the scenes, int64, (S,).
    """
    u = uniforms(seed, f"{stream}/contents", 0, numbers, 2)
    kinds = torch.bucketize(u[:, 0].contiguous(), torch.tensor(list(KIND_SHARES.values())).cumsum(0)[:-1], right=True)
    rows = torch.empty_like(numbers)
    for kind, table in enumerate(_seen_rows()):
        chosen = kinds == kind
        rows[chosen] = table[(u[chosen, 1] * len(table)).long()]
    return rows


def arrange(rows: Tensor, seed: int, stream: str, numbers: Tensor, layout: ShapesLayout = "free") -> Scenes:
    """Scenes of these contents at random positions.

    Objects are in two rows of at most two. Free: rows, and objects in a row, share the free space at random, so that
    nothing is rejected. Grid: every centre is one of nine positions, and two in a row (or two rows) are at both ends.
    Half of the scenes are then mirrored at the diagonal, or all where a relation needs it.

    Args:
        rows: of `contents()`, int64, (S,).
        seed: of the randomness.
        stream: name of the random numbers.
        numbers: numbers of the scenes, int64, (S,).
    """
    shape, colour, radii, direction = (part[rows] for part in _table())
    u = uniforms(seed, f"{stream}/places", 0, numbers, 18)
    least, most = radii.unbind(-1)
    radius = least + u[:, :4] * (most - least)
    slots = _slots((radius > 0).sum(1), u[:, 4])
    related = direction.any(1)
    if layout == "free":
        reach = radius * torch.tensor([REACH[name] for name in SHAPES])[shape]
        x, y = _spread_over_rows(reach, slots, u[:, 5:15])
        x = torch.where(related[:, None], _aligned(x, y, reach, u[:, 15]), x)
    else:
        x, y = _on_the_grid(radius, slots, related, u[:, 5:12])
    backwards = direction.sum(1) > 0  # the first object is the right or the lower one
    x, y = (torch.where(backwards[:, None], 1 - z, z) for z in (x, y))
    across = direction[:, 0] != 0  # left or right
    turned = (across | ~related & (u[:, 16] < 0.5))[:, None]
    x, y = torch.where(turned, y, x), torch.where(turned, x, y)
    empty = radius == 0
    return Scenes(shape, colour, x.masked_fill(empty, 0), y.masked_fill(empty, 0), radius)


def _slots(count: Tensor, u: Tensor) -> Tensor:
    """Slot of each object, 2 * row + column, (S, I); of three objects either row may hold two."""
    slots = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3, 1]])
    return slots[count - 1 + 2 * ((count == 3) & (u < 0.5)).long()]


def _spread_over_rows(reach: Tensor, slot: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Centres x and y, (S, I), that keep EDGE and GAP; u: uniform numbers, (S, 10)."""
    boxes = torch.zeros_like(reach).scatter(1, slot, reach).view(-1, 2, 2)  # (S, R, C)
    height = boxes.amax(2)
    lines = _spread(height, u[:, :2])
    x = _spread(boxes, u[:, 2:6].view(-1, 2, 2))
    y = lines[:, :, None] + (height[:, :, None] - boxes) * (2 * u[:, 6:].view(-1, 2, 2) - 1)
    return x.flatten(1).gather(1, slot), y.flatten(1).gather(1, slot)


def _spread(half: Tensor, u: Tensor) -> Tensor:
    """Centres of two intervals of half widths `half` in [0, 1], one after the other; a single one uses all the room."""
    alone = half[..., 1] == 0
    room = 1 - 2 * EDGE - 2 * half.sum(-1) - GAP * ~alone
    first = room * torch.where(alone, u[..., 0], u.amin(-1))
    second = room * u.amax(-1) + 2 * half[..., 0] + GAP
    return EDGE + half + torch.stack((first, second), -1)


def _aligned(x: Tensor, y: Tensor, reach: Tensor, u: Tensor) -> Tensor:
    """x, (S, I), with the second object's sampled again: within SLOPE times the offset in y from the first's."""
    offset = SLOPE * (y[:, 1] - y[:, 0]) * (2 * u - 1)
    second = (x[:, 0] + offset).clamp(EDGE + reach[:, 1], 1 - EDGE - reach[:, 1])
    return torch.stack((x[:, 0], second, x[:, 2], x[:, 3]), 1)


def _on_the_grid(radius: Tensor, slot: Tensor, related: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Centres x and y, (S, I), of objects of these radii; u: uniform numbers, (S, 7)."""
    taken = torch.zeros_like(radius, dtype=torch.bool).scatter(1, slot, radius > 0).view(-1, 2, 2)  # (S, R, C)
    rows = _steps(taken.any(2), u[:, :2])
    x = _steps(taken, u[:, 2:6].view(-1, 2, 2))
    y = rows[:, :, None].expand_as(x)
    x, y = (z.flatten(1).gather(1, slot) for z in (x, y))
    aside = _step(u[:, 6])  # the rows are two steps apart: SLOPE allows one
    x[:, 1] = torch.where(related, (x[:, 0] + aside).clamp(-1, 1), x[:, 1])
    large = (radius[:, :1] >= LARGE_FROM).long()  # then it is alone
    step = torch.tensor(GRID)[large]
    return 0.5 + step * x, 0.5 + step * y


def _steps(taken: Tensor, u: Tensor) -> Tensor:
    """Steps of two objects from the middle, (..., 2): both ends where both are there, else any."""
    return torch.where(taken.all(-1, keepdim=True), torch.tensor([-1.0, 1.0]), _step(u))


def _step(u: Tensor) -> Tensor:
    """-1, 0 or 1 by uniform numbers."""
    return (3 * u).floor() - 1
