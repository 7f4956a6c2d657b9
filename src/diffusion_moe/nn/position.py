"""Positions of tokens on the image grid: a sine-cosine table, or rotary over one or two axes.

Shape suffixes: N tokens of one image (row by row), D width, H heads, I width of one head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

BASE = 10000.0

Pairs = Literal["halves", "neighbours"]
"""Elements of a head that are rotated together: i and i + half of an axis' share, or 2i and 2i + 1."""


class Rotary(NamedTuple):
    """Cosines and sines of the rotation angles, both (N, I), or (B, 1, N, I) where images differ."""

    cos_NI: Tensor
    sin_NI: Tensor
    axes: int
    pairs: Pairs = "halves"


def _frequencies(count: int) -> Tensor:
    return BASE ** -(torch.arange(count, dtype=torch.float64) / count)


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of each token, (N,), float64."""
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    return rows.flatten(), columns.flatten()


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """Fixed table (N, D): the first half encodes the column, the second the row; sines before cosines (ViT, MAE)."""
    rows, columns = _grid(height, width)
    parts = []
    for axis in (columns, rows):
        angle = torch.outer(axis, _frequencies(dim // 4))
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()


def rotary_table(
    height: int, width: int, head_dim: int, axes: int, pairs: Pairs = "halves", still_tokens: int = 0
) -> Rotary:
    """Rotation angles of each token.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        head_dim: I.
        axes: 1: the token's index, over the whole head; 2: rows on the first half of the head, columns on the second.
        pairs: elements that are rotated together.
        still_tokens: tokens before those of the image that are not rotated (JiT's class tokens).
    """
    rows, columns = _grid(height, width)
    positions = [torch.arange(height * width, dtype=torch.float64)] if axes == 1 else [rows, columns]
    frequencies = _frequencies(head_dim // (2 * axes))
    angles = [torch.outer(position, frequencies) for position in positions]
    twice = [angle.repeat(1, 2) if pairs == "halves" else angle.repeat_interleave(2, dim=1) for angle in angles]
    angle_NI = torch.cat([torch.zeros(still_tokens, head_dim, dtype=torch.float64), torch.cat(twice, dim=1)])
    return Rotary(angle_NI.cos().float(), angle_NI.sin().float(), axes, pairs)


def apply_rotary(x_BHNI: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys, in float32; the result has their dtype."""
    x = x_BHNI.float()
    if rotary.pairs == "halves":
        first, second = x.unflatten(-1, (rotary.axes, 2, -1)).unbind(-2)
        rotated = torch.stack((-second, first), dim=-2).flatten(-3)
    else:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((-second, first), dim=-1).flatten(-2)
    return (x * rotary.cos_NI + rotated * rotary.sin_NI).to(x_BHNI.dtype)
