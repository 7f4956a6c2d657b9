"""Paths between noise and data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PathSample(NamedTuple):
    """A point on the path and the velocity there, both (B, C, H, W)."""

    x_t: Tensor
    velocity: Tensor


def rectified_flow(x1: Tensor, x0: Tensor, t_B: Tensor) -> PathSample:
    """The straight line from noise x0 at t = 0 to data x1 at t = 1 (rectified flow, arXiv 2209.03003, eq. 1)."""
    t = t_B.view(-1, *[1] * (x1.ndim - 1))
    return PathSample(x_t=t * x1 + (1 - t) * x0, velocity=x1 - x0)
