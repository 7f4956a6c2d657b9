"""Predictions of a network at a point of the straight path, and conversions between them.

With x_t = t x + (1 - t) epsilon, any of velocity = x - epsilon, x (data) and epsilon (noise) determines the others.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..config import Prediction
from .path import spread

__all__ = ["Prediction", "convert"]

# JiT, arXiv 2511.13720, table 1, with its clamp of 1 - t; the same clamp of t for a network that predicts noise.
_FORMULAS: dict[tuple[Prediction, Prediction], Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    ("velocity", "x"): lambda velocity, x_t, t, gap: x_t + (1 - t) * velocity,
    ("velocity", "epsilon"): lambda velocity, x_t, t, gap: x_t - t * velocity,
    ("x", "velocity"): lambda x, x_t, t, gap: (x - x_t) / (1 - t).clamp(min=gap),
    ("x", "epsilon"): lambda x, x_t, t, gap: (x_t - t * x) / (1 - t).clamp(min=gap),
    ("epsilon", "velocity"): lambda epsilon, x_t, t, gap: (x_t - epsilon) / t.clamp(min=gap),
    ("epsilon", "x"): lambda epsilon, x_t, t, gap: (x_t - (1 - t) * epsilon) / t.clamp(min=gap),
}


def convert(
    value: Tensor, x_t: Tensor, t: Tensor, source: Prediction, target: Prediction, min_gap: float = 0.0
) -> Tensor:
    """Convert a predicted `source` at x_t to the `target`.

    Args:
        value: the prediction, (B, C, H, W).
        x_t: (B, C, H, W).
        t: in [0, 1], (B,) or a scalar tensor.
        min_gap: lower bound of the divisor, 1 - t (from x) or t (from epsilon); with 0, x at t = 1 and epsilon at t = 0
            give infinities.
    """
    if source == target:
        return value
    return _FORMULAS[source, target](value, x_t, spread(t, x_t), min_gap)
