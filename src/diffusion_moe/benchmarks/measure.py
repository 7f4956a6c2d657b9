"""Measuring: interleaved times, what autograd keeps, memory's peak, operators, waits, the machine's ceilings."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Any]

WARM_UP_ROUNDS = 3
"""Rounds before the timed ones: what is made at a first call, and until memory has found its places."""

WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_consecutive", "equal"}
"""Operators whose answer the host waits for."""


@dataclass(frozen=True)
class Times:
    """Seconds of one contestant."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(median, low, high)


def interleaved(runs: Sequence[Run], seconds: float, device: torch.device, least: int = 5) -> list[Times]:
    """Time several contestants in turn, so that a disturbance meets all of them.

    Args:
        seconds: about how long to go on. least: rounds at least.
    """
    for _ in range(WARM_UP_ROUNDS):
        for run in runs:
            run()
    taken: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(taken[0]) < least or time.perf_counter() - begin < seconds:
        for run, record in zip(runs, taken):
            record.append(_timed(run, device))
    return [Times.of(record) for record in taken]


def _timed(run: Run, device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(forward: Run, excluded: Sequence[Tensor] = ()) -> int:
    """Bytes that autograd keeps of a forward pass, every storage once; parameters (`excluded`) do not count."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        kept.append(tensor)  # so that no address is given out twice
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return total


def peak_bytes(run: Run, device: torch.device) -> int:
    """Memory at its highest during a run, above what was there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    level = highest = 0
    for event in _allocations(profile):
        level += event
        highest = max(highest, level)
    return highest


def _allocations(profile: Any) -> Iterator[int]:
    """Bytes taken (positive) and given back (negative), in order."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        yield event.nbytes()


class Operators(TorchDispatchMode):
    """Counts operators called, and those that make the host wait, inside a `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.called = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.called += 1
        self.waits += name in WAITS
        return func(*args, **(kwargs or {}))


def operators(run: Run) -> tuple[int, int]:
    """Operators called by a run, and how many of them make the host wait for a device."""
    with Operators() as counter:
        run()
    return counter.called, counter.waits


def kernels(run: Run, device: torch.device) -> int | None:
    """Kernels that a run launches on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronise(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def flops(run: Run) -> int:
    """Floating-point operations of matrix products in a run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best."""

    matmul_flops: float
    """Floating-point operations a second of a large matrix product."""
    copy_bytes: float
    """Bytes read and written a second by a large copy."""


@cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the machine, once a process."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    matmul = min(_timed(lambda: a @ b, device) for _ in range(8))
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(_timed(lambda: target.copy_(source), device) for _ in range(8))
    return Ceilings(2 * size**3 / matmul, 2 * source.nbytes / copy)


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "diffusion_moe": version("diffusion-moe"),
        "python": platform.python_version(),
    }


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """The dtype that products run in; float32 is no autocast."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
