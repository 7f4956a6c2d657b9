"""`combine` as one gather through the inverse permutation: no zero fill, no atomics, sums in a fixed order.

Shape suffixes: A rows, T tokens, D width, C columns of a tile.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device

MAX_COLUMNS = 2048
MAX_UNROLLED = 16
"""Rows a token up to which a program issues all its loads at once."""


@triton.jit(do_not_specialize=["A", "T"])
def _combine(y, row, start, out, A, T, D: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * C + tl.arange(0, C)
    sum_C = tl.zeros((C,), dtype=tl.float32)
    if K > 0:  # every token has K rows
        for k in tl.static_range(K):
            at_C = y + tl.load(row + token * K + k) * D + column_C
            sum_C += tl.load(at_C, mask=column_C < D, other=0.0).to(tl.float32)
    else:
        end = tl.load(start + token + 1, mask=token + 1 < T, other=A)
        for index in range(tl.load(start + token), end):
            at_C = y + tl.load(row + index) * D + column_C
            sum_C += tl.load(at_C, mask=column_C < D, other=0.0).to(tl.float32)
    tl.store(out + token * D + column_C, sum_C, mask=column_C < D)


def combine(y_AD: Tensor, row_A: Tensor, start_T: Tensor, per_token: int) -> Tensor:
    """See `ops.combine`; a token's rows are added in the order of row_A."""
    T, D = len(start_T), y_AD.shape[1]
    out_TD = torch.empty(T, D, dtype=y_AD.dtype, device=y_AD.device)
    if out_TD.numel():
        sizes = constants(D, per_token)
        inputs = (y_AD.contiguous(), row_A.contiguous(), start_T.contiguous())
        with on_device(y_AD):
            _combine[(T, triton.cdiv(D, sizes["C"]))](
                *inputs, out_TD, len(row_A), T, **sizes, num_warps=warps(sizes["C"])
            )
    return out_TD


def constants(width: int, per_token: int) -> dict[str, int]:
    """The constants that the kernel is compiled for."""
    columns = min(triton.next_power_of_2(width), MAX_COLUMNS)
    return {"D": width, "K": per_token if per_token <= MAX_UNROLLED else 0, "C": columns}


def warps(columns: int) -> int:
    """Number of warps with which a thread reads 8 columns: 16 bytes of bfloat16."""
    return max(1, min(8, columns // 256))
