"""`ops.gmm` and `ops.gmm_wgrad` for devices and dtypes that torch's grouped_mm has no fused kernel for.

The host does not wait for the offsets. The grid has a slot for every tile of rows that any offsets can need, and each
program finds its expert: with tiles of R rows, expert e with rows a to b has slots a // R + e to b // R + e, which
follow each other without a gap and end at A // R + E. Slots without rows end at once. Sums are in float32, without
atomics. Matrices may have more than 2^31 elements.

Operands in float32 are multiplied in TF32 (10 bits of mantissa) where torch may use it, else in three TF32 matmuls
(tf32x3), whose results are about as exact as float32's. Shape suffixes: A rows, E experts, D and F widths, N experts
compared at a time; R rows, C columns and K depth of a tile.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import is_interpreting, on_device

ROWS, COLUMNS, DEPTH = 64, 128, 32
"""Largest tile, for float32: of the result, and of what is multiplied at a time."""
LOW_PRECISION_ROWS = 128
"""`ROWS` of bfloat16 and float16."""
SMALLEST = 16
"""Smallest side of a tile that tensor cores take."""
FEWEST_EXPERTS, MOST_EXPERTS = 64, 1024
"""Bounds of the number of experts whose offsets a program compares at a time."""
BLOCK = 4096
"""Elements that a program fills with zeros."""
OPTIONS = {"num_warps": 8, "num_stages": 3}
"""With these no tile spills registers, and all fit 99 KiB of shared memory (compute capability 8.6, 8.9 and 12.0)."""


@triton.jit
def _first_row(offsets, expert):
    """First row of an expert."""
    return tl.load(offsets + expert - 1, mask=expert > 0, other=0)


@triton.jit(do_not_specialize=["E"])
def _matmul(
    x, w, offsets, y, E,
    D: tl.constexpr, F: tl.constexpr,
    STRIDE_A: tl.constexpr, STRIDE_E: tl.constexpr, STRIDE_D: tl.constexpr, STRIDE_F: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One tile of x times the matrix of its rows' expert."""
    blocks: tl.constexpr = (F + C - 1) // C
    slot, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    expert = tl.zeros((), dtype=tl.int32)  # the number of experts whose last slot is an earlier one
    for skipped in range(0, E, N):
        expert_N = skipped + tl.arange(0, N)
        end_N = tl.load(offsets + expert_N, mask=expert_N < E, other=2**30)
        expert += tl.sum(((end_N // R + expert_N < slot) & (expert_N < E)).to(tl.int32), axis=0)
    # No expert is left for a slot of rows that are after the last offset.
    first, end = _first_row(offsets, expert), tl.load(offsets + expert, mask=expert < E, other=0)
    row = first + (slot - first // R - expert) * R
    if row < end:
        row_R, depth_K = row.to(tl.int64) + tl.arange(0, R), tl.arange(0, K).to(tl.int64)
        column_C = (block * C + tl.arange(0, C)).to(tl.int64)
        x_at = x + row_R[:, None] * STRIDE_A + depth_K[None, :]
        w_at = w + expert.to(tl.int64) * STRIDE_E + depth_K[:, None] * STRIDE_D + column_C[None, :] * STRIDE_F
        sum_RC = tl.zeros((R, C), dtype=tl.float32)
        for start in range(0, D, K):
            x_RK = tl.load(x_at, mask=(row_R < end)[:, None] & (depth_K < D - start)[None, :], other=0.0)
            w_KC = tl.load(w_at, mask=(depth_K < D - start)[:, None] & (column_C < F)[None, :], other=0.0)
            if UPCAST:
                x_RK, w_KC = x_RK.to(tl.float32), w_KC.to(tl.float32)
            sum_RC = tl.dot(x_RK, w_KC, sum_RC, input_precision=PRECISION)
            x_at += K
            w_at += K * STRIDE_D
        mask_RC = (row_R < end)[:, None] & (column_C < F)[None, :]
        tl.store(y + row_R[:, None] * F + column_C[None, :], sum_RC, mask=mask_RC)


@triton.jit
def _weight_gradient(
    x, y, offsets, dw,
    D: tl.constexpr, F: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_Y: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of an expert's gradient: the sum over its rows, which is zero where there are none."""
    down: tl.constexpr = (D + R - 1) // R
    across: tl.constexpr = (F + C - 1) // C
    expert, block = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    first, end = _first_row(offsets, expert), tl.load(offsets + expert)
    row_K = first.to(tl.int64) + tl.arange(0, K)
    row_R = (block // across) * R + tl.arange(0, R)
    column_C = (block % across) * C + tl.arange(0, C)
    x_at = x + row_R[:, None] + row_K[None, :] * STRIDE_X
    y_at = y + row_K[:, None] * STRIDE_Y + column_C[None, :]
    sum_RC = tl.zeros((R, C), dtype=tl.float32)
    for start in range(first, end, K):
        left_K = tl.arange(0, K) < end - start
        x_RK = tl.load(x_at, mask=(row_R < D)[:, None] & left_K[None, :], other=0.0)
        y_KC = tl.load(y_at, mask=left_K[:, None] & (column_C < F)[None, :], other=0.0)
        if UPCAST:
            x_RK, y_KC = x_RK.to(tl.float32), y_KC.to(tl.float32)
        sum_RC = tl.dot(x_RK, y_KC, sum_RC, input_precision=PRECISION)
        x_at += K * STRIDE_X
        y_at += K * STRIDE_Y
    index_RC = (expert.to(tl.int64) * D + row_R[:, None]) * F + column_C[None, :]
    tl.store(dw + index_RC, sum_RC, mask=(row_R < D)[:, None] & (column_C < F)[None, :])


@triton.jit
def _zero_empty(dw, offsets, SIZE: tl.constexpr, C: tl.constexpr):
    """Fill a block of an expert's gradient with zeros if the expert has no rows."""
    blocks: tl.constexpr = (SIZE + C - 1) // C
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if _first_row(offsets, expert) == tl.load(offsets + expert):
        index_C = block * C + tl.arange(0, C)
        at_C = dw + expert.to(tl.int64) * SIZE + index_C
        tl.store(at_C, tl.zeros((C,), dtype=dw.dtype.element_ty), mask=index_C < SIZE)


def gmm(x_AD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """See `ops.gmm`. The matrices are read in any layout."""
    E, D, F = w_EDF.shape
    y_AF = torch.empty(len(x_AD), F, dtype=x_AD.dtype, device=x_AD.device)
    if not D:
        return y_AF.zero_()
    if y_AF.numel():
        x_AD = _with_unit_stride(x_AD)
        sizes = constants(x_AD, w_EDF)
        slots = len(x_AD) // sizes["R"] + E
        with on_device(x_AD):
            _matmul[(slots * triton.cdiv(F, sizes["C"]),)](
                x_AD, w_EDF, offsets_E.contiguous(), y_AF, E, **sizes, **OPTIONS
            )
    return y_AF


def gmm_wgrad(x_AD: Tensor, y_AF: Tensor, offsets_E: Tensor) -> Tensor:
    """See `ops.gmm_wgrad`."""
    E, D, F = len(offsets_E), x_AD.shape[1], y_AF.shape[1]
    dw_EDF = torch.empty(E, D, F, dtype=x_AD.dtype, device=x_AD.device)
    if dw_EDF.numel():
        x_AD, y_AF = _with_unit_stride(x_AD), _with_unit_stride(y_AF)
        sizes = gradient_constants(x_AD, y_AF)
        tiles = triton.cdiv(D, sizes["R"]) * triton.cdiv(F, sizes["C"])
        with on_device(x_AD):
            _weight_gradient[(E * tiles,)](x_AD, y_AF, offsets_E.contiguous(), dw_EDF, **sizes, **OPTIONS)
    return dw_EDF


def zero_empty_(dw_EDF: Tensor, offsets_E: Tensor) -> None:
    """Fill the gradients of experts without rows with zeros; of the others nothing is read or written."""
    assert dw_EDF.is_contiguous()
    if dw_EDF.numel():
        size = dw_EDF[0].numel()
        with on_device(dw_EDF):
            _zero_empty[(len(dw_EDF) * triton.cdiv(size, BLOCK),)](dw_EDF, offsets_E, SIZE=size, C=BLOCK)


def constants(x_AD: Tensor, w_EDF: Tensor) -> dict[str, int | str | bool]:
    """The constants that the forward kernel is compiled for: widths, layout and dtype, never the number of rows."""
    E, D, F = w_EDF.shape
    at_a_time = max(FEWEST_EXPERTS, min(triton.next_power_of_2(E), MOST_EXPERTS))
    strides = dict(zip(("STRIDE_A", "STRIDE_E", "STRIDE_D", "STRIDE_F"), (x_AD.stride(0), *w_EDF.stride())))
    tile = {"R": _rows(x_AD.dtype), "C": _side(F, COLUMNS), "K": _side(D, DEPTH)}
    return {"D": D, "F": F, **strides, **_arithmetic(), **tile, "N": at_a_time}


def gradient_constants(x_AD: Tensor, y_AF: Tensor) -> dict[str, int | str | bool]:
    """The constants that the kernel of the weights' gradient is compiled for."""
    D, F = x_AD.shape[1], y_AF.shape[1]
    tile = {"R": _side(D, _rows(x_AD.dtype)), "C": _side(F, COLUMNS), "K": DEPTH}
    return {"D": D, "F": F, "STRIDE_X": x_AD.stride(0), "STRIDE_Y": y_AF.stride(0), **_arithmetic(), **tile}


def precision() -> str:
    """Arithmetic of float32 matmuls: tf32 where torch may use it, else tf32x3."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _arithmetic() -> dict[str, str | bool]:
    # Triton's interpreter multiplies bfloat16 as if it were whole numbers.
    return {"PRECISION": precision(), "UPCAST": is_interpreting()}


def _rows(dtype: torch.dtype) -> int:
    return ROWS if dtype == torch.float32 else LOW_PRECISION_ROWS


def _side(width: int, largest: int) -> int:
    return max(SMALLEST, min(triton.next_power_of_2(width), largest))


def _with_unit_stride(x_AD: Tensor) -> Tensor:
    """x_AD if the elements of a row are neighbours, else a copy."""
    return x_AD if x_AD.stride(1) == 1 else x_AD.contiguous()
