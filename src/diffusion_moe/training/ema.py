"""The exponential moving average of a model: parameters and routing state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moe.parallel import local_part


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers (thresholds, correction biases), by name.

    Of a model spread over processes, what is held here.
    """
    tensors = {name: local_part(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: part for name, part in tensors.items() if part is not None and part.is_floating_point()}


def ema_decay(decay: float, updates: int, warmup: bool) -> float:
    """The decay of an average's next update.

    Args:
        updates: optimizer steps done before it. warmup: whether it is less at first.
    """
    # TensorFlow's ExponentialMovingAverage with num_updates; diffusers' EMAModel.get_decay for updates > 0.
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, in place, for all tensors at once."""
    averages, frozen = averaged_tensors(ema), {n for n, p in model.named_parameters() if not p.requires_grad}
    moved = {name: tensor for name, tensor in averaged_tensors(model).items() if name not in frozen}
    # By name: peft's adapters of experts change the order of a model's parameters.
    torch._foreach_lerp_([averages[n].detach() for n in moved], [t.detach() for t in moved.values()], 1 - decay)


@torch.no_grad()
def begin_average(ema: nn.Module, model: nn.Module) -> None:
    """Set an average to the model's weights and routing state, in place."""
    tensors = model.state_dict()
    for name, tensor in ema.state_dict().items():
        part, source = local_part(tensor), local_part(tensors[name])
        if part is not None and source is not None:
            part.copy_(source)
