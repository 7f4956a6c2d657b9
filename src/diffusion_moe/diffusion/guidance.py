"""Classifier-free guidance (arXiv 2207.12598), on an interval of times (arXiv 2404.07724)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""x (B, C, H, W) and t (a scalar tensor) to dx/dt (B, C, H, W)."""


def guided(
    conditional: Velocity, unconditional: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """unconditional + scale * (conditional - unconditional) for t inside the interval, ends included; else conditional.

    With scale 1 the unconditional velocity is never evaluated.
    """
    if scale == 1:
        return conditional
    low, high = interval

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if not low <= float(t) <= high:
            return conditional(x, t)
        null = unconditional(x, t)
        return torch.lerp(null, conditional(x, t), scale)

    return velocity
