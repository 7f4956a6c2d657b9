"""Distributions of the training time t in [0, 1], as functions of given random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import DiffusionConfig
from ..randomness import normal, uniform


def draw_steps(seed: int, step: int, samples: Tensor, count: int = 1000) -> Tensor:
    """One step of the DDPM schedule a sample, uniform, int64, (S,), a function of (seed, training step, sample)."""
    return (uniform(seed, "time", step, samples) * count).long()


def draw_times(config: DiffusionConfig, seed: int, step: int, samples: Tensor) -> Tensor:
    """One time a sample, (S,), a function of (seed, step, sample).

    logit_normal: sigmoid of a normal number (Stable Diffusion 3, arXiv 2403.03206, section 3.1).
    """
    if config.time == "uniform":
        return uniform(seed, "time", step, samples)
    return torch.sigmoid(config.time_mean + config.time_std * normal(seed, "time", step, samples, (1,))[:, 0])
