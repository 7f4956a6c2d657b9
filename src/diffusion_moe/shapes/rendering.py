"""Rendering scenes: each object has a coverage between 0 and 1 that mixes its colour into the background.

The coverage is exact for shapes whose edges follow the axes (products of overlaps of intervals). For others each edge
covers its distance in pixels plus one half, clipped, and the edges of a triangle are multiplied: within 0.1 of exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sampling import Scenes
from .scene import BACKGROUND, COLOURS, SHAPES, Shape

SQUARE_HALF = 0.88
"""Half side of a square of radius 1, about as large as the circle."""
CROSS_REACH, CROSS_HALF = 1.05, 0.36
"""Half length and half width of a bar."""
TRIANGLE_OUT = 1.2
"""From the centroid of the equilateral triangle to a corner; it points up."""
AREAS: dict[Shape, float] = {
    "circle": math.pi,
    "square": 4 * SQUARE_HALF**2,
    "triangle": 0.75 * math.sqrt(3) * TRIANGLE_OUT**2,
    "cross": 8 * CROSS_REACH * CROSS_HALF - 4 * CROSS_HALF**2,
}
"""Area of each shape of radius 1."""


def coverage(shape: Shape, x: Tensor, y: Tensor, radius: Tensor, size: tuple[int, int]) -> Tensor:
    """Share of each pixel that an object covers, (K, H, W).

    Args:
        x, y, radius: of K objects, in pixels, (K,). size: H and W.
    """
    dx = torch.arange(size[1]) + 0.5 - x[:, None]
    dy = torch.arange(size[0]) + 0.5 - y[:, None]
    if shape == "circle":
        squares = dx.square()[:, None, :] + dy.square()[:, :, None]
        return (radius[:, None, None] - squares.sqrt_()).add_(0.5).clamp_(0, 1)
    if shape == "triangle":
        # The sides are half as far from the centroid as the corners; the normals point down and 30 degrees up.
        inner = TRIANGLE_OUT / 2 * radius[:, None, None] + 0.5
        aside, down = math.sqrt(0.75) * dx[:, None, :], dy[:, :, None]
        sides = ((inner - d).clamp_(0, 1) for d in (down, aside - 0.5 * down, -aside - 0.5 * down))
        return math.prod(sides, start=torch.ones(()))
    if shape == "square":
        half = SQUARE_HALF * radius
        return _overlap(dy, half)[:, :, None] * _overlap(dx, half)[:, None, :]
    long, wide = CROSS_REACH * radius, CROSS_HALF * radius
    row, column = _overlap(dy, wide), _overlap(dx, wide)
    bars = row[:, :, None] * _overlap(dx, long)[:, None, :] + _overlap(dy, long)[:, :, None] * column[:, None, :]
    return bars - row[:, :, None] * column[:, None, :]


def _overlap(offset: Tensor, half: Tensor) -> Tensor:
    """Share of each unit pixel inside [-half, half]; offset: of the pixels' middles, (K, P)."""
    half = half[:, None]
    return (torch.minimum(offset + 0.5, half) - torch.maximum(offset - 0.5, -half)).clamp_(0, 1)


def render(scenes: Scenes, size: int) -> Tensor:
    """Images of scenes, (S, 3, size, size), float32, [-1, 1]."""
    background, colours = palette()
    images = background[:, None, None].repeat(len(scenes), 1, size, size)
    for index, shape in enumerate(SHAPES):
        s, i = torch.nonzero((scenes.shape == index) & (scenes.radius > 0), as_tuple=True)
        if not len(s):
            continue
        x, y, radius = (field[s, i] * size for field in (scenes.x, scenes.y, scenes.radius))
        alpha = coverage(shape, x, y, radius, (size, size))
        difference = colours[scenes.colour[s, i]] - background
        images.index_add_(0, s, alpha[:, None] * difference[:, :, None, None])
    return images.clamp_(-1, 1)


def palette() -> tuple[Tensor, Tensor]:
    """Background, (3,), and colours in the order of COLOURS, (6, 3), in [-1, 1]."""
    return torch.tensor(BACKGROUND) / 127.5 - 1, torch.tensor(list(COLOURS.values())) / 127.5 - 1
