"""Rank and collectives: the identity on one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
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


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def to_main(value: Any) -> list[Any]:
    """The values of all processes in their order, on the main process; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    found: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, found)
    return found or []


@contextmanager
def torchrun_processes(backend: str = "gloo", timeout: timedelta = timedelta(days=7)) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, each with a GPU of its own where there are any.

    Args:
        backend: of the group. timeout: after which a process that waits for another gives up.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=timeout)
    yield
    # Only after success: with NCCL this waits for all others, of whom some may be gone.
    dist.destroy_process_group()
