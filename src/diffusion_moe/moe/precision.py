"""What autocast means for the layer: products in its dtype, routers always in full precision.

What autocast asks for is fast on GPUs and on some processors. Others multiply bfloat16 at half the speed of float32
(Intel without AMX) or at a hundredth (without AVX512). There the layer multiplies in float32, and keeps and answers in
what was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Precision = Literal["auto", "bf16", "fp32"]
CpuProducts = Literal["auto", "narrow", "float32"]
VARIABLE = "DIFFUSION_MOE_CPU_PRODUCTS"
"""Environment variable, for tensors on a CPU: auto (bfloat16 and float16 are multiplied in float32 where the processor
is faster so), narrow (as they are) or float32."""

_chosen: list[CpuProducts] = []  # by `use_products`, innermost last; backward passes run on other threads


def slower_than_float32(cpuinfo: str) -> frozenset[torch.dtype]:
    """The dtypes that a processor multiplies slower than float32.

    Measured (docs/log.md): with AVX512-BF16 but no AMX float32 is twice as fast as bfloat16 on an Intel Xeon, and half
    as fast on an AMD EPYC; without any of these bfloat16 is emulated, 5 to 200 times slower than float32.

    Args:
        cpuinfo: the text of /proc/cpuinfo, of which the first processor counts. Nothing is known of processors that
            list no x86 flags there; they are taken to be as fast.
    """
    fields = dict(line.replace("\t", "").partition(":")[::2] for line in cpuinfo.strip().split("\n\n")[0].splitlines())
    flags = set(fields.get("flags", "").split())
    if not flags:
        return frozenset()
    of_amd = fields.get("vendor_id", "").strip() in ("AuthenticAMD", "HygonGenuine")
    fast = {
        torch.bfloat16: "amx_bf16" in flags or ("avx512_bf16" in flags and of_amd),
        torch.float16: bool({"amx_fp16", "avx512_fp16"} & flags),
    }
    return frozenset(dtype for dtype, is_fast in fast.items() if not is_fast)


def _cpuinfo() -> str:
    """As much as the first processor needs."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return file.read(2**14)
    except OSError:
        return ""


SLOW_DTYPES = slower_than_float32(_cpuinfo())
"""Of this machine's processor."""
FAST_IN_BF16 = "flags" in _cpuinfo() and torch.bfloat16 not in SLOW_DTYPES
"""Whether this machine's processor is known to multiply bfloat16 faster than float32."""


class Chosen(NamedTuple):
    """What a model computes in."""

    precision: Literal["bf16", "fp32"]
    why: str = ""
    """Of auto, the reason."""

    def __str__(self) -> str:
        return f"{self.precision} (auto: {self.why})" if self.why else self.precision


def choose_precision(asked: Precision, device: torch.device) -> Chosen:
    """What is asked for; for auto bf16 where the device is known to be fast in it, else fp32."""
    if asked != "auto":
        return Chosen(asked)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Chosen("bf16", "this GPU multiplies bfloat16")
        return Chosen("fp32", "this GPU emulates bfloat16")
    if device.type != "cpu":
        return Chosen("fp32", f"of {device.type} nothing is known")
    if not FAST_IN_BF16:
        return Chosen("fp32", "this processor is not known to be fast in bfloat16")
    if product_dtype(torch.empty(0), torch.bfloat16) == torch.float32:
        return Chosen("fp32", f"{VARIABLE} is {os.environ.get(VARIABLE)}")
    return Chosen("bf16", "this processor is fast in bfloat16")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` are asked for in: autocast's where it is on, else its own."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply in, on the device of `x`, what is asked for in `dtype`: that, or float32 on some CPUs.

    Raises:
        ValueError: the environment variable names no choice.
    """
    if x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    name = _chosen[-1] if _chosen else os.environ.get(VARIABLE) or "auto"
    if name not in get_args(CpuProducts):
        raise ValueError(f"{VARIABLE} is {name!r}; choose {', '.join(get_args(CpuProducts))}")
    return torch.float32 if name == "float32" or (name == "auto" and dtype in SLOW_DTYPES) else dtype


@contextmanager
def use_products(name: CpuProducts) -> Iterator[None]:
    """Choose for the products on a CPU that run inside, whatever the environment variable says."""
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context with autocast off on the device of `x` (the meta device knows none)."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
