"""The choice between torch and our Triton kernels for the layer's operators, made here alone.

On a CUDA device the kernels in `moe/kernels` run, unless DIFFUSION_MOE_KERNELS says otherwise. Triton is imported only
where a kernel is about to run: builds of torch for CPUs have none.

Grouped matmuls (`choose_grouped_matmul`):

| device | bfloat16 | float32 | float16 | float64 |
| --- | --- | --- | --- | --- |
| CUDA, compute capability 9.x and 10.x | grouped_mm | triton | triton | loop |
| CUDA, 8.x and 12.x | triton | triton | triton | loop |
| CUDA, older or without Triton | loop | loop | loop | loop |
| CPU | grouped_mm | grouped_mm | loop | loop |

Operands that grouped_mm does not take (`ops._fits_grouped_mm`) go to the next kernel. The loop waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

Kernels = Literal["auto", "torch", "triton"]
VARIABLE = "DIFFUSION_MOE_KERNELS"
"""Environment variable: auto (Triton on a CUDA device that supports it, else torch), torch, or triton (always; on a CPU
only under Triton's interpreter)."""
MAX_EXPERTS = 1024
"""Most experts that one program of a kernel can hold."""
FUSED_CAPABILITIES = (9, 10)
"""Major compute capabilities on which grouped_mm is one kernel, in bfloat16. Elsewhere it copies the offsets to the
host and loops over experts (pytorch, aten/src/ATen/native/cuda/GroupedBlas.cpp)."""

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
    if any(x.dtype == torch.float64 for x in tensors):
        return False
    return _why_not_triton(tensors[0].device, experts) is None


class MatmulChoice(NamedTuple):
    """The kernel of grouped matmuls."""

    kernel: Literal["grouped_mm", "triton", "loop"]
    """`torch.nn.functional.grouped_mm`, `kernels.grouped_matmul`, or a matmul an expert."""
    why: str = ""
    """Reason why the kernels before it cannot be used; empty for the first."""

    def __str__(self) -> str:
        return f"{self.kernel} ({self.why})" if self.why else self.kernel


def choose_grouped_matmul(device: torch.device, dtype: torch.dtype) -> MatmulChoice:
    """The kernel of grouped matmuls on a device, in a dtype: see the table above.

    Raises:
        ValueError: Triton is asked for and cannot run.
    """
    why_not_grouped_mm = f"{VARIABLE} is triton" if chosen() == "triton" else _why_not_grouped_mm(device, dtype)
    if why_not_grouped_mm is None:
        return MatmulChoice("grouped_mm")
    why_not_triton = "kernels take no float64" if dtype == torch.float64 else _why_not_triton(device)
    if why_not_triton is None:
        return MatmulChoice("triton", why_not_grouped_mm)
    return MatmulChoice("loop", f"{why_not_grouped_mm}; {why_not_triton}")


def _why_not_grouped_mm(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason against torch's grouped_mm; None where it is one kernel, or on a CPU a loop in C++."""
    if device.type != "cuda":
        return None if dtype in (torch.bfloat16, torch.float32) else f"grouped_mm takes no {_name(dtype)}"
    if dtype != torch.bfloat16:
        return "on CUDA grouped_mm is fused in bfloat16 alone"
    major, minor = _capability(device.index)
    if major not in FUSED_CAPABILITIES:
        return f"grouped_mm is fused on compute capability 9.x and 10.x, not on {major}.{minor}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_device(x: Tensor) -> AbstractContextManager:
    """A context that makes the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _why_not_triton(device: torch.device, experts: int = 1) -> str | None:
    """The reason why Triton kernels do not run on a device; None if they do.

    Raises:
        ValueError: Triton is asked for and cannot run.
    """
    name = chosen()
    if name == "torch":
        return f"{VARIABLE} is torch"
    obstacle = _obstacle(device, experts)
    if name == "triton" and obstacle is not None:
        raise ValueError(f"{VARIABLE} is triton, but {obstacle}; set it to auto")
    if name == "auto" and device.type != "cuda":
        return "kernels are for CUDA devices"
    return obstacle


def _obstacle(device: torch.device, experts: int) -> str | None:
    """The reason why no Triton kernel can run; None if one can."""
    if device.type != "cuda" and not is_interpreting():
        return f"the tensors are on {device.type} and TRITON_INTERPRET=1 is not set"
    if not _has_triton():
        return "triton cannot be imported"
    if device.type == "cuda" and _capability(device.index) < (8, 0):
        return f"the device has compute capability {_capability(device.index)} and 8.0 is needed"
    if experts > MAX_EXPERTS:
        return f"there are {experts} experts and the kernels take {MAX_EXPERTS}"
    return None


def is_interpreting() -> bool:
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
