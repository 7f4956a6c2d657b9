"""The dtypes of the layer: matmuls follow autocast, routers always compute in float32.

Low precision (bfloat16, float16) is fast on GPUs and on some processors. Other processors multiply bfloat16 at half the
speed of float32 (Intel without AMX) or at a hundredth (without AVX512). On these the layer multiplies in float32; what
it keeps and returns still has the dtype that autocast asks for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["auto", "bf16", "fp32"]
CpuMatmul = Literal["auto", "low_precision", "float32"]
VARIABLE = "DIFFUSION_MOE_CPU_MATMUL"
"""Environment variable for matmuls on a CPU that are asked for in low precision: auto (float32 where the processor is
faster in it), low_precision (as asked) or float32."""
OLD_VARIABLE = "DIFFUSION_MOE_CPU_PRODUCTS"
"""Former name of the variable, refused with the new one."""

# Choices of `use_cpu_matmul`, innermost last. Not a context variable, because backward passes run on other threads.
_chosen: list[CpuMatmul] = []


def slower_than_float32(cpuinfo: str) -> frozenset[torch.dtype]:
    """The low-precision dtypes whose matmuls are slower than float32 on a processor.

    Measured (docs/log.md): with AVX512-BF16 but no AMX float32 is twice as fast as bfloat16 on an Intel Xeon, and half
    as fast on an AMD EPYC; without any of these bfloat16 is emulated, 5 to 200 times slower than float32.

    Args:
        cpuinfo: the text of /proc/cpuinfo; its first processor counts. Processors without x86 flags are unknown, and
            taken to be fast in every dtype.
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
    """The beginning of /proc/cpuinfo, which holds the first processor; empty where there is none."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return file.read(2**14)
    except OSError:
        return ""


SLOW_DTYPES = slower_than_float32(_cpuinfo())
"""`slower_than_float32` of this machine's processor."""
FAST_IN_BF16 = "flags" in _cpuinfo() and torch.bfloat16 not in SLOW_DTYPES
"""True where this machine's processor is known to multiply bfloat16 faster than float32."""


class Chosen(NamedTuple):
    """The precision that a model computes in."""

    precision: Literal["bf16", "fp32"]
    why: str = ""
    """The reason, where auto chose."""

    def __str__(self) -> str:
        return f"{self.precision} (auto: {self.why})" if self.why else self.precision


def choose_precision(asked: Precision, device: torch.device) -> Chosen:
    """The precision that is asked for; for auto bf16 where the device is known to be fast in it, else fp32."""
    if asked != "auto":
        return Chosen(asked)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Chosen("bf16", "this GPU multiplies bfloat16")
        return Chosen("fp32", "this GPU emulates bfloat16")
    if device.type != "cpu":
        return Chosen("fp32", f"nothing is known about {device.type}")
    if not FAST_IN_BF16:
        return Chosen("fp32", "this processor is not known to be fast in bfloat16")
    if matmul_dtype(torch.empty(0), torch.bfloat16) == torch.float32:
        return Chosen("fp32", f"{VARIABLE} is {os.environ.get(VARIABLE)}")
    return Chosen("bf16", "this processor is fast in bfloat16")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matmuls of `x` are asked for in: autocast's where it is on, else that of `x`."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def matmul_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of matmuls on the device of `x` that are asked for in `dtype`: the same, or float32 on some CPUs.

    Raises:
        ValueError: the environment variable has an unknown value, or the variable's old name is set.
    """
    if x.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if os.environ.get(OLD_VARIABLE):
        raise ValueError(f"{OLD_VARIABLE} is set; use {VARIABLE} (one of {', '.join(get_args(CpuMatmul))}) instead")
    name = _chosen[-1] if _chosen else os.environ.get(VARIABLE) or "auto"
    if name not in get_args(CpuMatmul):
        raise ValueError(f"{VARIABLE} is {name!r}; choose {', '.join(get_args(CpuMatmul))}")
    return torch.float32 if name == "float32" or (name == "auto" and dtype in SLOW_DTYPES) else dtype


@contextmanager
def use_cpu_matmul(name: CpuMatmul) -> Iterator[None]:
    """Choose for matmuls on a CPU that run inside the block; the environment variable is ignored."""
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


@contextmanager
def exact_float32(convolutions: bool = False) -> Iterator[None]:
    """Compute float32 matmuls in float32 inside the block, whatever the process allows.

    Torch may be allowed to round their operands to TensorFloat-32 on a GPU and to bfloat16 on a CPU. A compiler does
    not see the block; see `exact_linear`.

    Args:
        convolutions: hold for convolutions too, which torch rounds on a GPU unless told otherwise.
    """
    if torch.compiler.is_compiling():
        yield
        return
    backends: Any = torch.backends
    switches = [backends.cuda.matmul, backends.mkldnn.matmul]
    if convolutions:
        switches += [backends.cudnn.conv, backends.mkldnn.conv]
    rounding = [(switch, switch.fp32_precision) for switch in switches if switch.fp32_precision in ("tf32", "bf16")]
    for switch, _ in rounding:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, before in rounding:
            if switch is not backends.cudnn.conv:  # the others follow a more general setting where they have none
                switch.fp32_precision = "none"
            if switch.fp32_precision != before:
                switch.fp32_precision = before


def exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer under `exact_float32`; in compiled code an operator that enters that block when it runs.

    The gradients' matmuls follow the process' setting.
    """
    if torch.compiler.is_compiling():
        return _exact_linear(x, weight, bias)
    return F.linear(x, weight, bias)


@torch.library.custom_op("diffusion_moe::exact_linear", mutates_args=())
def _exact_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with exact_float32():
        return F.linear(x, weight, bias)


@_exact_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _save_for_exact_linear(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _exact_linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    rows = dy.flatten(0, -2)
    dx = dy @ weight if needs_x else None
    dweight = rows.T @ x.flatten(0, -2) if needs_weight else None
    return dx, dweight, rows.sum(0) if needs_bias else None


_exact_linear.register_autograd(_exact_linear_backward, setup_context=_save_for_exact_linear)


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context with autocast off on the device of `x`. The meta device has no autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
