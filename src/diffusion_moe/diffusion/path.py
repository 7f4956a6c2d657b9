"""Paths between noise and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Noise = Callable[[int], Tensor]
"""Call number (0, 1, 2, …) to noise like x, so that callers can make it a function of seed, step and sample."""


class PathSample(NamedTuple):
    """A point on the path, with everything that may be predicted there; images (B, C, H, W), times (B,)."""

    x_t: Tensor
    velocity: Tensor
    x: Tensor
    """Data, at t = 1."""
    epsilon: Tensor
    """Noise, at t = 0."""
    t: Tensor


def spread(t: Tensor, like: Tensor) -> Tensor:
    """Values of shape (B,) as (B, 1, …, 1), to multiply `like`; a scalar is unchanged."""
    return t if t.ndim == 0 else t.view(-1, *[1] * (like.ndim - 1))


def rectified_flow(x1: Tensor, x0: Tensor, t_B: Tensor) -> PathSample:
    """Straight line from noise x0 at t = 0 to data x1 at t = 1 (rectified flow, arXiv 2209.03003, eq. 1)."""
    t = spread(t_B, x1)
    return PathSample(x_t=t * x1 + (1 - t) * x0, velocity=x1 - x0, x=x1, epsilon=x0, t=t_B)
