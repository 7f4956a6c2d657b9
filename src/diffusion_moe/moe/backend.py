"""Which implementation of the layer's operators runs: torch's, our Triton kernels, or SonicMoE's experts.

The one place that decides. Triton is imported only where a kernel is about to run: builds of torch for CPUs have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Kernels = Literal["auto", "torch", "triton", "sonic"]
VARIABLE = "DIFFUSION_MOE_KERNELS"
"""Environment variable: auto (Triton on a CUDA device that can, else torch), torch, triton (always, on a CPU only under
Triton's interpreter), or sonic (SonicMoE's experts, the rest as by auto)."""
MAX_EXPERTS = 1024
"""Experts that one program of a kernel holds side by side."""

_chosen: list[Kernels] = []  # by `use`, innermost last; no context variable, for backward passes run on other threads


def chosen() -> Kernels:
    """The innermost `use`, else the environment variable, else auto.

    Raises:
        ValueError: there is no such choice.
    """
    name = _chosen[-1] if _chosen else os.environ.get(VARIABLE) or "auto"
    if name not in get_args(Kernels):
        raise ValueError(f"{VARIABLE} is {name!r}; choose {', '.join(get_args(Kernels))}")
    return cast(Kernels, name)


@contextmanager
def use(name: Kernels) -> Iterator[None]:
    """Choose for the operators that run inside, whatever the environment variable says."""
    _chosen.append(name)
    try:
        chosen()  # refuses what there is not
        yield
    finally:
        _chosen.pop()


def takes_triton(*tensors: Tensor, experts: int = 1) -> bool:
    """Whether a Triton kernel runs on these tensors. float64 is always torch's.

    Args:
        experts: how many of them the kernel must hold side by side.

    Raises:
        ValueError: Triton is asked for and cannot run.
    """
    name = chosen()
    if name == "torch" or any(x.dtype == torch.float64 for x in tensors):
        return False
    why_not = _why_not(tensors[0].device, experts)
    if name == "triton" and why_not is not None:
        raise ValueError(f"{VARIABLE} is triton, but {why_not}; set it to auto")
    return why_not is None and (name == "triton" or tensors[0].is_cuda)


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _why_not(device: torch.device, experts: int) -> str | None:
    """Why no Triton kernel can run, if so."""
    if device.type != "cuda" and not _is_interpreting():
        return f"the tensors are on {device.type} and TRITON_INTERPRET=1 is not set"
    if not _has_triton():
        return "triton cannot be imported"
    if device.type == "cuda" and _capability(device.index) < (8, 0):
        return f"the device has compute capability {_capability(device.index)} and 8.0 is needed"
    if experts > MAX_EXPERTS:
        return f"there are {experts} experts and the kernels take {MAX_EXPERTS}"
    return None


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
