"""Exponential moving average (EMA) of a model: parameters and routing state."""

from __future__ import annotations

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
