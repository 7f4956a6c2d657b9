"""Rank and collectives; on one process they are the identity."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """True on the main process, which writes files and progress."""
    return rank() == 0


def choose_device(name: Literal["auto", "cpu", "cuda"], option: str = "device") -> torch.device:
    """The device that an option asks for; each process has its own GPU.

    Raises:
        ValueError: CUDA is asked for but not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option} is cuda, but no CUDA device is available; set it to auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From the CPU it is copied through pinned memory, so that the host does not wait."""
    if device.type == "cpu" or x.device.type != "cpu":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over processes, on every process; `x` itself on one."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


def all_gather(x: Tensor) -> Tensor:
    """The rows of all processes, which have equally many, in the order of the processes; `x` itself on one."""
    if world_size() == 1:
        return x
    rows = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(rows, x.detach().contiguous())
    return rows


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """The main process' value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def to_main(value: Any) -> list[Any]:
    """The values of all processes in their order, on the main process; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def meet(store: dist.Store, number: int, world: int, timeout: timedelta) -> str:
    """A fresh name that the running processes agree on, and that no process before a restart knows.

    Restarts cannot be counted, because agents of several nodes disagree on their number. So every other process posts a
    key of its own, and process 0 answers each key with the name, until all have it.

    Args:
        store: the store of all processes, which may hold entries of earlier ones.
        number: index of this process.
        world: number of processes.
        timeout: longest wait for the others.

    Raises:
        TimeoutError, torch.distributed.DistStoreError: some processes did not start in time.
    """
    if number:
        key = uuid.uuid4().hex
        store.set(f"meet/call/{store.add('meet/calls', 1)}", key)
        store.wait([f"meet/answer/{key}"], timeout)
        name = store.get(f"meet/answer/{key}").decode()
        store.add(f"meet/present/{name}", 1)
        return name
    name, end, answered = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds(), set[int]()
    while (present := 1 + store.add(f"meet/present/{name}", 0)) < world:
        for call in set(range(1, 1 + store.add("meet/calls", 0))) - answered:
            if store.check([f"meet/call/{call}"]):  # else it comes later, or its process has ended
                store.set(f"meet/answer/{store.get(f'meet/call/{call}').decode()}", name)
                answered.add(call)
        if time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, f"only {present} of {world} processes have started in {timeout}")
        time.sleep(0.01)
    return name


def claim_gpu(store: dist.Store, device: torch.device) -> None:
    """Note in the store of all processes that this one uses a GPU.

    By the GPU's identity, because a process may see one GPU alone, under the same number as others theirs.

    Raises:
        ValueError: another process uses it; NCCL would refuse that later, in many lines.
    """
    identity = torch.cuda.get_device_properties(device).uuid
    if store.add(f"gpu/{identity}", 1) > 1:
        gpus = torch.cuda.device_count()
        raise ValueError(
            f"several processes use the same GPU {identity}, and a process sees {gpus}; start as many processes on a "
            f"machine as it has GPUs (torchrun --nproc-per-node {gpus})"
        )


@contextmanager
def torchrun_processes(backend: str = "gloo", timeout: timedelta = timedelta(days=7)) -> Iterator[None]:
    """Join the processes that torchrun started, if it did, each with its own GPU if there are any.

    Args:
        backend: backend of the process group.
        timeout: how long a process waits for another before it raises an error.

    Raises:
        ValueError: with NCCL, two processes use the same GPU.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else None
    shared, number, _ = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps its store over restarts, and with it the addresses of processes that have ended.
    store = dist.PrefixStore(meet(shared, number, world, timeout), shared)
    if device is not None:
        claim_gpu(store, device)
    # With a device NCCL connects here instead of in the first collective (`_new_process_group_helper` in torch's
    # distributed_c10d.py: eager_connect_single_device), so that its errors come early.
    dist.init_process_group(backend, store=store, rank=number, world_size=world, timeout=timeout, device_id=device)
    yield
    # Only after success: with NCCL this waits for all others, some of which may have ended.
    dist.destroy_process_group()
