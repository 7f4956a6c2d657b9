"""Classifier-free guidance (arXiv 2207.12598), on an interval of times (arXiv 2404.07724)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]
"""x (B, C, H, W) and t (a scalar tensor: a time in [0, 1], or a DDPM step) to the output (B, C or 2C, H, W)."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""x (B, C, H, W) and t (a scalar tensor) to dx/dt (B, C, H, W)."""


def inside(t: Tensor, interval: tuple[float, float]) -> bool:
    """True if t is strictly between the ends of the interval; the ends 0 and 1 count as infinite.

    Compared in float32, where steps from torch.linspace meet ends such as 0.1 exactly (JiT, arXiv 2511.13720).
    """
    low, high = interval
    t = t.float().cpu()
    return (low == 0 or bool(t > torch.tensor(low))) and (high == 1 or bool(t < torch.tensor(high)))


def guided(
    conditional: Model,
    unconditional: Model,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Model:
    """Model unconditional + scale * (conditional - unconditional) for t inside the interval, else conditional.

    With scale 1 the unconditional model is never evaluated.

    Args:
        conditional: model with class or prompt.
        unconditional: model without.
        scale: guidance scale.
        interval: see `inside`; leave it at 0 to 1 for DDPM steps.
        channels: guide only so many channels of the output, the first ones; None: all. The papers' DDPM sampling guides
            three of the four epsilons. Do not guide a learned variance: with an output of 2C channels, give at most C.
        both: returns the conditional and the unconditional output together; None: two evaluations.
    """
    if scale == 1:
        return conditional

    def model(x: Tensor, t: Tensor) -> Tensor:
        if not inside(t, interval):
            return conditional(x, t)
        output, null = (conditional(x, t), unconditional(x, t)) if both is None else both(x, t)
        count = output.shape[1] if channels is None else channels
        return torch.cat((torch.lerp(null[:, :count], output[:, :count], scale), output[:, count:]), dim=1)

    return model
