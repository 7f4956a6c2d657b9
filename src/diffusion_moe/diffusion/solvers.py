"""Solvers of dx/dt = velocity(x, t) from t = 0 (noise) to t = 1 (data), as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .guidance import Velocity
from .path import Noise
from .prediction import convert


@dataclass
class Counted:
    """A velocity, or any model of (x, t), that counts its evaluations."""

    velocity: Velocity
    evaluations: int = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        return self.velocity(x, t)


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Euler's method through the given times, (S + 1,): order 1, S evaluations."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor, last_euler: bool = False) -> Tensor:
    """Heun's method through the given times, (S + 1,): order 2, 2 S evaluations.

    Args:
        velocity: dx/dt.
        x: noise, (B, C, H, W).
        times: ascending, (S + 1,).
        last_euler: make the last step an Euler step, as JiT (arXiv 2511.13720): 2 S - 1 evaluations, none at t = 1,
            where the velocity of a network that predicts x is infinite.
    """
    if last_euler:
        return euler(velocity, heun(velocity, x, times[:-1]), times[-2:])
    for t, t_next in pairwise(times):
        slope = velocity(x, t)
        next_slope = velocity(x + (t_next - t) * slope, t_next)
        x = x + (t_next - t) * (slope + next_slope) / 2
    return x


SOLVERS: dict[str, Callable[[Velocity, Tensor, Tensor], Tensor]] = {
    "euler": euler,
    "heun": heun,
    "heun_euler": partial(heun, last_euler=True),  # as JiT
}


def dopri5(velocity: Velocity, x: Tensor, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Adaptive Runge-Kutta pair of Dormand and Prince, order 5, from t = 0 to 1, by torchdiffeq.

    The error is a root mean square over the whole batch, so the steps, and slightly the result for one sample, depend
    on the batch's other samples. `Counted` counts the evaluations.
    """
    from torchdiffeq import odeint  # which loads scipy

    times = torch.tensor([0.0, 1.0], device=x.device, dtype=x.dtype)
    return odeint(lambda t, x: velocity(x, t), x, times, rtol=rtol, atol=atol, method="dopri5")[-1]


def sde(velocity: Velocity, x: Tensor, times: Tensor, noise: Noise) -> Tensor:
    """Euler-Maruyama method on the reverse SDE of the flow: S evaluations, S - 1 calls of `noise`.

    The diffusion coefficient is w(t) = 1 - t (SiT, arXiv 2401.08740, the reverse-time SDE of section 2). The last step
    is an Euler step of the flow, without noise and its drift, and gives the expected data.

    Args:
        velocity: dx/dt.
        x: noise, (B, C, H, W).
        times: ascending, (S + 1,).
        noise: normal, with the standard deviation of x.
    """
    for i, (t, t_next) in enumerate(pairwise(times[:-1])):
        dt = t_next - t
        slope = velocity(x, t)
        # The SDE dx = (v + w/2 score) dt + sqrt(w) dW has the marginals of dx = v dt. As x_t given the data is normal
        # around t x1 with deviation 1 - t, score = -E[epsilon | x_t] / (1 - t); so with w = 1 - t, w/2 score is
        # -epsilon / 2, finite to the end. Noise of deviation s has score -epsilon / (s^2 (1 - t)); w = s^2 (1 - t).
        epsilon = convert(slope, x, t, "velocity", "epsilon")
        x = x + dt * (slope - epsilon / 2) + ((1 - t) * dt).sqrt() * noise(i)
    return euler(velocity, x, times[-2:])


def even_times(steps: int, device: torch.device | str = "cpu") -> Tensor:
    """`steps` equal steps from t = 0 (noise) to t = 1 (data), (steps + 1,), float32."""
    return torch.linspace(0, 1, steps + 1, device=device)
