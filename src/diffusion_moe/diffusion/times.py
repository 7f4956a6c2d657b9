"""Training times t in [0, 1] and DDPM steps, sampled by counter-based random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import DiffusionConfig
from ..randomness import normal, uniform


def sample_steps(seed: int, step: int, samples: Tensor, count: int = 1000) -> Tensor:
    """A uniform step of the DDPM schedule for each sample, int64, (S,), a function of (seed, training step, sample)."""
    return (uniform(seed, "time", step, samples) * count).long()


def sample_times(config: DiffusionConfig, seed: int, step: int, samples: Tensor) -> Tensor:
    """A time for each sample, (S,), a function of (seed, training step, sample).

    logit_normal: sigmoid of a normal number (Stable Diffusion 3, arXiv 2403.03206, section 3.1).
    """
    if config.time == "uniform":
        return uniform(seed, "time", step, samples)
    return torch.sigmoid(config.time_mean + config.time_std * normal(seed, "time", step, samples, (1,))[:, 0])
