"""Measuring: candidates timed in turn, the machine's ceilings, and records of both."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..moe import backend as kernel_backend
from ..moe.precision import matmul_dtype
from .candidates import Candidate
from .counting import Run, kernels, peak_bytes, saved_bytes, work

WARM_UP_ROUNDS = 3
"""Rounds before the timed ones, for what a first call sets up; fewer where they are longer than the time to measure."""
SHORTEST = 0.02
"""Least seconds of a timing on a GPU: shorter runs are queued several times, as layers of a model are."""


@dataclass(frozen=True)
class Times:
    """Seconds of one candidate."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(median, low, high, len(seconds))

    def record(self) -> dict[str, Any]:
        """Milliseconds, ready for JSON."""
        return {
            "ms": 1e3 * self.median,
            "ms_quartiles": [1e3 * self.low, 1e3 * self.high],
            "rounds": self.rounds,
        }


def interleaved(runs: Sequence[Run], seconds: float, device: torch.device) -> list[Times]:
    """Time several candidates in turn, so that a disturbance meets all of them.

    Args:
        seconds: approximate time; at least five rounds are run, or three where one takes longer than half of it.
    """
    begin = time.perf_counter()
    estimates: list[float] = []
    for i in range(WARM_UP_ROUNDS):
        if i and time.perf_counter() - begin > seconds:
            break
        estimates = [_timed(run, device) for run in runs]
    # On a GPU a run is queued several times, so that the device or the host is timed, whichever is slower.
    on_gpu = device.type == "cuda"
    repeats = [min(100, math.ceil(SHORTEST / max(e, 1e-6))) if on_gpu else 1 for e in estimates]
    taken: list[list[float]] = [[] for _ in runs]
    least = 5 if sum(estimates) < seconds / 2 else 3
    begin = time.perf_counter()
    while len(taken[0]) < least or time.perf_counter() - begin < seconds:
        for run, repeat, record in zip(runs, repeats, taken):
            record.append(_timed(run, device, repeat))
    return [Times.of(record) for record in taken]


def _timed(run: Run, device: torch.device, repeats: int = 1) -> float:
    """Seconds of one run; on a GPU between two events on its stream."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin_event.record()
    for _ in range(repeats):
        run()
    end_event.record()
    torch.cuda.synchronize(device)
    return begin_event.elapsed_time(end_event) / 1e3 / repeats


def measurements(candidate: Candidate, times: Times, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Times and counts of a candidate, and their shares of the machine's ceilings; dtype: of autocast."""
    done = work(candidate.counted or candidate.run, device)
    record = times.record()
    if candidate.forward is not None:
        record["saved_bytes"] = saved_bytes(candidate.forward, candidate.parameters)
    record["peak_bytes"] = peak_bytes(candidate.run, device)
    record |= {"operators": done.operators, "waits": done.waits, "kernels": kernels(candidate.run, device)}
    multiplied = matmul_dtype(torch.empty(0, device=device), dtype)
    return record | utilisation(done.flops, done.bytes, times.median, device, multiplied)


def utilisation(flops: int, moved: int, seconds: float, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Speed of matmuls (in `dtype`) and of memory, and their shares of the machine's ceilings."""
    limits = ceilings(device, dtype)
    return {
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "flops": flops,
        "flops_per_second": flops / seconds,
        "utilisation": flops / seconds / limits.matmul_flops,
        "operator_bytes": moved,
        "bytes_per_second": moved / seconds,
        "copy_utilisation": moved / seconds / limits.copy_bytes,
        "matmul_ceiling": limits.matmul_flops,
        "copy_ceiling": limits.copy_bytes,
    }


@dataclass(frozen=True)
class Ceilings:
    """Highest speeds of the machine."""

    matmul_flops: float
    """Floating-point operations a second of a large matmul."""
    copy_bytes: float
    """Bytes read and written a second by a large copy."""


@cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the machine, once a process."""
    size = 8192 if device.type == "cuda" else 256
    matmul = _matmul_seconds(size, device, dtype)
    # Twice the size takes eight times as long: processors that emulate a type would take minutes.
    while device.type == "cpu" and size < 2048 and matmul < 0.05:
        size *= 2
        matmul = _matmul_seconds(size, device, dtype)
    source = torch.empty(2**30 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(_timed(lambda: target.copy_(source), device) for _ in range(8))
    return Ceilings(2 * size**3 / matmul, 2 * source.nbytes / copy)


def _matmul_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Least time of a square matmul."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return min(_timed(lambda: a @ b, device) for _ in range(8))


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads, implementation of our operators and grouped matmuls, and versions."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "backend": backend(device),
        "grouped_matmul": {
            name: str(kernel_backend.choose_grouped_matmul(device, dtype))
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        },
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "triton": installed_version("triton") if on_gpu else None,
        "diffusion_moe": installed_version("diffusion-moe"),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name, or its kind where the system does not report a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def backend(device: torch.device) -> str:
    """Implementation of our operators on a device, as `moe.backend` chooses it."""
    name = kernel_backend.chosen()
    if name != "auto":
        return name
    return "triton" if kernel_backend.takes_triton(torch.empty(1, device=device)) else "torch"


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None if there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
