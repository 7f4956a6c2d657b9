"""The exponential moving average of a model: parameters and routing state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moe.parallel import local_part


def averaged_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and persistent buffers (thresholds, correction biases), in the order of the state dict.

    Of a model spread over processes, what is held here.
    """
    tensors = model.state_dict(keep_vars=True).values()
    return [part for tensor in tensors if (part := local_part(tensor)) is not None and part.is_floating_point()]


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, in place, for all tensors at once."""
    averages = [tensor.detach() for tensor in averaged_tensors(ema)]
    torch._foreach_lerp_(averages, [tensor.detach() for tensor in averaged_tensors(model)], 1 - decay)
