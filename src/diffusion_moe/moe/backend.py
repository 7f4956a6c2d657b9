"""The choice between torch and our Triton kernels for the layer's operators, made here alone.

On a CUDA device the kernels in `moe/kernels` run, unless DIFFUSION_MOE_KERNELS says otherwise. Triton is imported only
where a kernel is about to run: builds of torch for CPUs have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

Kernels = Literal["auto", "torch", "triton"]
VARIABLE = "DIFFUSION_MOE_KERNELS"
"""Environment variable: auto (Triton on a CUDA device that supports it, else torch), torch, or triton (always; on a CPU
only under Triton's interpreter)."""
MAX_EXPERTS = 1024
"""Most experts that one program of a kernel can hold."""

# Choices of `use`, innermost last. Not a context variable, because backward passes run on other threads.
_chosen: list[Kernels] = []


def chosen() -> Kernels:
    """The choice of the innermost `use`, else of the environment variable, else auto.

    Raises:
        ValueError: the choice is none of `Kernels`.
    """
    name = _chosen[-1] if _chosen else os.environ.get(VARIABLE) or "auto"
    if name not in get_args(Kernels):
        raise ValueError(f"{VARIABLE} is {name!r}; choose {', '.join(get_args(Kernels))}")
    return cast(Kernels, name)


@contextmanager
def use(name: Kernels) -> Iterator[None]:
    """Choose for the operators that run inside the block; the environment variable is ignored."""
    _chosen.append(name)
    try:
        chosen()  # raises for an unknown name
        yield
    finally:
        _chosen.pop()


def takes_triton(*tensors: Tensor, experts: int = 1) -> bool:
    """True where a Triton kernel runs on these tensors. float64 always runs in torch.

    Args:
        experts: number of experts that one program of the kernel must hold.

    Raises:
        ValueError: Triton is asked for and cannot run.
    """
    name = chosen()
    if name == "torch" or any(x.dtype == torch.float64 for x in tensors):
        return False
    obstacle = _obstacle(tensors[0].device, experts)
    if name == "triton" and obstacle is not None:
        raise ValueError(f"{VARIABLE} is triton, but {obstacle}; set it to auto")
    return obstacle is None and (name == "triton" or tensors[0].is_cuda)


def on_device(x: Tensor) -> AbstractContextManager:
    """A context that makes the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _obstacle(device: torch.device, experts: int) -> str | None:
    """The reason why no Triton kernel can run; None if one can."""
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
