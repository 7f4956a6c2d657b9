"""Candidates: what is timed and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import MoEFeedForward, MoEOutput, RoutingContext


@dataclass(frozen=True)
class Candidate:
    """Something to time."""

    run: Callable[[], Any]
    forward: Callable[[], Any] | None = None
    """Part whose saved tensors are counted."""
    parameters: tuple[Tensor, ...] = ()
    counted: Callable[[], Any] | None = None
    """Run whose operators are counted, where `run` replays a graph that hides them."""


def layer_candidates(module: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Candidate]:
    """A layer's forward pass, and its forward and backward pass, on the same random tokens for every layer.

    Args:
        shape: of the input (images, tokens of one, width).
        dtype: of matmuls.
    """
    parameters = tuple(module.parameters())
    device = parameters[0].device
    torch.manual_seed(1)
    x = torch.randn(shape, device=device, requires_grad=True)
    direction = torch.randn(shape, device=device)
    context = RoutingContext(
        time_B=torch.rand(shape[0], device=device),
        time_embedding_BD=torch.randn(shape[0], shape[2], device=device),
    )

    def forward() -> tuple[Tensor, ...]:
        with autocast(device, dtype):
            out = module(x, context=context) if isinstance(module, MoEFeedForward) else module(x)
        return (out.hidden_states, *out.report.losses.values()) if isinstance(out, MoEOutput) else (out,)

    def both() -> None:
        y, *losses = forward()
        total = torch.linalg.vecdot(y.float().flatten(), direction.flatten())
        (total + sum(losses)).backward()
        for parameter in (*parameters, x):
            parameter.grad = None

    return {
        "forward": Candidate(forward, forward, parameters),
        "forward+backward": Candidate(both, forward, parameters),
    }


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to the dtype of matmuls; none for float32."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
