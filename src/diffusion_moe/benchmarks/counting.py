"""Counts of a run: saved and peak memory, operators, bytes, floating-point operations, kernels, waits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Any]

WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_consecutive", "equal"}
"""Operators whose result the host waits for."""
SYNC_WARNING = "called a synchronizing CUDA operation"
"""Torch's warning for each wait (torch.cuda.set_sync_debug_mode)."""


def saved_bytes(forward: Run, excluded: Sequence[Tensor] = ()) -> int:
    """Bytes that autograd saves in a forward pass, every storage once; parameters (`excluded`) do not count."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        kept.append(tensor)  # so that no address is used twice
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return total


def peak_bytes(run: Run, device: torch.device) -> int:
    """Peak memory during a run, above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    found: Any = profile.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    # Bytes allocated are positive, bytes freed negative.
    return max(accumulate((event.nbytes() for event in events), initial=0))


@dataclass(frozen=True)
class Work:
    """Counts of one run."""

    operators: int
    """Operators called, views among them."""
    bytes: int
    """Bytes of every operator's inputs and outputs, without views: memory traffic where no cache helps."""
    flops: int
    """Floating-point operations of matmuls."""
    waits: int
    """Times that the host waits for the device; on a CPU, times that it would wait for one."""


class _Operators(TorchDispatchMode):
    """Counts operators, their bytes, and those that make the host wait, inside a `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.called = self.bytes = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        out = func(*args, **(kwargs or {}))
        self.called += 1
        self.waits += name in WAITS
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        is_view = not func._schema.is_mutable and all(x.untyped_storage().data_ptr() in storages for x in outputs)
        if not (is_view or "empty" in name):
            self.bytes += sum(_bytes(tensor) for tensor in (*inputs, *outputs))
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; an expanded one takes no more than its storage."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def work(run: Run, device: torch.device) -> Work:
    """Count one run with its compiled parts uncompiled; waits on a GPU are counted in another run, unchanged."""
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False) as matmuls,
        _Operators() as operators,
    ):
        run()
    waits = sync_warnings(run) if device.type == "cuda" else operators.waits
    return Work(operators.called, operators.bytes, matmuls.get_total_flops(), waits)


def sync_warnings(run: Run) -> int:
    """Times that the host waits for the GPU inside a run, as torch reports them."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC_WARNING in str(warning.message) for warning in caught)


def kernels(run: Run, device: torch.device) -> int | None:
    """Kernels, copies and fills that a run launches on a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize(device)
    return launches(profile.profiler.kineto_results.events())


def launches(events: Iterable[Any]) -> int:
    """Number of the profiler's events that ran on a GPU, without ranges that a user named."""
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type() == on_gpu and not event.is_user_annotation() for event in events)
