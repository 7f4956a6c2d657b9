"""Exponential moving average (EMA) of a model: parameters and routing state.

EDM2 (arXiv 2312.02696) weighs the weights of step t in an average at step T by a power function, (t / T) ** gamma, and
measures its width by its standard deviation over T. Equations are numbered as in its published code.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from ..storage.shards import local_tensor


def ema_tensors(model: nn.Module) -> dict[str, Tensor]:
    """This process' part of parameters and persistent buffers (thresholds, correction biases), by name."""
    tensors = {name: local_tensor(tensor) for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def ema_decay(decay: float, updates: int, warmup: bool) -> float:
    """Decay of an EMA's next update, after so many; with warm-up it begins lower."""
    # TensorFlow's ExponentialMovingAverage with num_updates; diffusers' EMAModel.get_decay for updates > 0.
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


@cache
def power_exponent(std: float) -> float:
    """Exponent gamma of the power function of a width; 0 is the even average, of width 0.289."""
    # EDM2 eq. 123: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); eq. 126 is the largest root of this cubic.
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_decay(std: float, step: int) -> float:
    """Decay of an EMA's update at a step, from 1, that makes it a power function of this width.

    The first update takes the weights whole, so the initial ones are not averaged in. EDM2 measures time in images;
    here it is steps, also if the batch size changes on resuming.
    """
    return (1 - 1 / step) ** (power_exponent(std) + 1)  # EDM2 eq. 127


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, in place, for all tensors at once."""
    tensors, frozen = ema_tensors(ema), {n for n, p in model.named_parameters() if not p.requires_grad}
    learning = {name: tensor for name, tensor in ema_tensors(model).items() if name not in frozen}
    # By name: peft's adapters of experts change the order of a model's parameters.
    torch._foreach_lerp_([tensors[name] for name in learning], list(learning.values()), 1 - decay)


@torch.no_grad()
def reset_ema(ema: nn.Module, model: nn.Module) -> None:
    """Set an EMA to the model's weights and routing state, in place."""
    tensors = model.state_dict()
    for name, tensor in ema.state_dict().items():
        local_tensor(tensor).copy_(local_tensor(tensors[name]))
