"""Rank and collectives: the identity on one process."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


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


def meet(store: dist.Store, number: int, world: int, timeout: timedelta) -> str:
    """A name that the processes running now agree on, and that none before them has heard.

    Restarts cannot be counted: agents of several nodes disagree on their number. So every process calls with a word
    of its own, and process 0 answers to each word with the name, until all have heard it.

    Args:
        number: of this process. world: how many there are.

    Raises:
        TimeoutError, torch.distributed.DistStoreError: not all have come in time.
    """
    if number:
        word = uuid.uuid4().hex
        store.set(f"meet/call/{store.add('meet/calls', 1)}", word)
        store.wait([f"meet/answer/{word}"], timeout)
        name = store.get(f"meet/answer/{word}").decode()
        store.add(f"meet/present/{name}", 1)
        return name
    name, end, answered = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds(), set[int]()
    while (present := 1 + store.add(f"meet/present/{name}", 0)) < world:
        for call in set(range(1, 1 + store.add("meet/calls", 0))) - answered:
            if store.check([f"meet/call/{call}"]):  # else it comes later, or who called has died over it
                store.set(f"meet/answer/{store.get(f'meet/call/{call}').decode()}", name)
                answered.add(call)
        if time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, f"only {present} of {world} processes have started in {timeout}")
        time.sleep(0.01)
    return name


@contextmanager
def torchrun_processes(backend: str = "gloo", timeout: timedelta = timedelta(days=7)) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, each with a GPU of its own where there are any.

    Args:
        backend: of the group. timeout: after which a process that waits for another gives up.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    shared, number, _ = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps its store over restarts, and with it the addresses of processes that are gone.
    store = dist.PrefixStore(meet(shared, number, world, timeout), shared)
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=timeout)
    yield
    # Only after success: with NCCL this waits for all others, of whom some may be gone.
    dist.destroy_process_group()
