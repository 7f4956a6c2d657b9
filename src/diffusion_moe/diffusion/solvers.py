"""Solvers of dx/dt = velocity(x, t), as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .guidance import Velocity


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Euler's method through the given times, (S + 1,): order 1, S evaluations."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Heun's method: order 2, 2 S evaluations."""
    for t, t_next in pairwise(times):
        slope = velocity(x, t)
        ahead = velocity(x + (t_next - t) * slope, t_next)
        x = x + (t_next - t) * (slope + ahead) / 2
    return x


SOLVERS: dict[str, Callable[[Velocity, Tensor, Tensor], Tensor]] = {"euler": euler, "heun": heun}
EVALUATIONS_PER_STEP = {"euler": 1, "heun": 2}


def even_times(steps: int, device: torch.device | str = "cpu") -> Tensor:
    """`steps` equal steps from t = 0 (noise) to t = 1 (data), (steps + 1,), float32."""
    return torch.linspace(0, 1, steps + 1, device=device)
