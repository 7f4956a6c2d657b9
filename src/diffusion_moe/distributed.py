"""Rank and collectives: the identity on one process."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and progress."""
    return rank() == 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over processes, on every process; `x` itself on one."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total
