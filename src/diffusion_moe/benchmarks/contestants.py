"""What is timed: something to run, and what is worth counting of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import MoEOutput


@dataclass(frozen=True)
class Contestant:
    """Something to time, and what is worth counting of it."""

    run: Callable[[], Any]
    forward: Callable[[], Any] | None = None
    """The part whose saved tensors count."""
    parameters: tuple[Tensor, ...] = ()
    counted: Callable[[], Any] | None = None
    """What operators are counted of, where `run` replays a graph that hides them."""


def layer_contestants(module: nn.Module, x: Tensor, direction: Tensor, dtype: torch.dtype) -> dict[str, Contestant]:
    """A layer's forward pass, and the same with the backward pass.

    Args:
        x: tokens, (images, tokens of one, width), requiring a gradient. direction: the output's gradient, of x's shape.
        dtype: of products.
    """
    parameters = tuple(module.parameters())

    def forward() -> tuple[Tensor, ...]:
        with autocast(x.device, dtype):
            out = module(x)
        return (out.hidden_states, *out.report.losses.values()) if isinstance(out, MoEOutput) else (out,)

    def both() -> None:
        y, *losses = forward()
        total = torch.linalg.vecdot(y.float().flatten(), direction.flatten())
        (total + sum(losses)).backward()
        for parameter in (*parameters, x):
            parameter.grad = None

    return {
        "forward": Contestant(forward, forward, parameters),
        "forward+backward": Contestant(both, forward, parameters),
    }


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """The dtype that products run in; float32 is no autocast."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
