"""Positions of tokens on the image grid: a sine-cosine table, or rotary over one or two axes.

Shape suffixes: N tokens of one image (row by row), D width, H heads, I width of one head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BASE = 10000.0


class Rotary(NamedTuple):
    """Cosines and sines of the rotation angles, both (N, I)."""

    cos_NI: Tensor
    sin_NI: Tensor
    axes: int


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


def rotary_table(height: int, width: int, head_dim: int, axes: int) -> Rotary:
    """Rotation angles of each token.

    One axis: the token's number, over the whole head. Two: rows on the first half of the head, columns on the second.
    Each part is rotated by halves.
    """
    rows, columns = _grid(height, width)
    numbers = [torch.arange(height * width, dtype=torch.float64)] if axes == 1 else [rows, columns]
    frequencies = _frequencies(head_dim // (2 * axes))
    angle_NI = torch.cat([torch.outer(number, frequencies).repeat(1, 2) for number in numbers], dim=1)
    return Rotary(angle_NI.cos().float(), angle_NI.sin().float(), axes)


def apply_rotary(x_BHNI: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys, in float32; the result has their dtype."""
    x = x_BHNI.float()
    first, second = x.unflatten(-1, (rotary.axes, 2, -1)).unbind(-2)
    turned = torch.stack((-second, first), dim=-2).flatten(-3)
    return (x * rotary.cos_NI + turned * rotary.sin_NI).to(x_BHNI.dtype)
