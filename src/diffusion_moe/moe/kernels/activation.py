"""`weighted_activation` and its backward, each as one pass over tiles of rows and columns.

The arithmetic is in float32. One program owns its rows, so that the dot products for the router's gradient are summed
in a fixed order. Shape suffixes: A rows, F width of the hidden layer, H columns of the first projection; R rows and C
columns of a tile.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device

TILE = 2048
"""Elements in a tile."""
MAX_COLUMNS = 1024


@triton.jit
def _gelu_parts(x):
    """s with gelu(x) = x s, and the derivative of gelu; 0.5 (1 + tanh u) = sigmoid(2 u)."""
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)
    return s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@triton.jit
def _silu_parts(x):
    """s with silu(x) = x s, and the derivative of silu."""
    s = tl.sigmoid(x)
    return s, s + x * s * (1 - s)


@triton.jit(do_not_specialize=["A"])
def _activation_forward(
    h, weight, out, A, F: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    if WEIGHTED:
        weight_R1 = tl.load(weight + row_R, mask=row_R < A, other=0.0).to(tl.float32)[:, None]
    for start in range(0, F, C):
        column_C = start + tl.arange(0, C)
        mask_RC = (row_R < A)[:, None] & (column_C < F)[None, :]
        index_RC = row_R[:, None] * F + column_C[None, :]
        if KIND == "swiglu":
            gate_RC = tl.load(h + index_RC + row_R[:, None] * F, mask=mask_RC, other=0.0).to(tl.float32)
            value_RC = tl.load(h + index_RC + row_R[:, None] * F + F, mask=mask_RC, other=0.0).to(tl.float32)
            a_RC = gate_RC * tl.sigmoid(gate_RC) * value_RC
        else:
            x_RC = tl.load(h + index_RC, mask=mask_RC, other=0.0).to(tl.float32)
            s_RC, _ = _gelu_parts(x_RC) if KIND == "gelu" else _silu_parts(x_RC)
            a_RC = x_RC * s_RC
        if WEIGHTED:
            a_RC *= weight_R1
        tl.store(out + index_RC, a_RC, mask=mask_RC)


@triton.jit(do_not_specialize=["A"])
def _activation_backward(
    h,
    weight,
    grad,
    out,
    dh,
    dweight,
    A,
    F: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    if WEIGHTED:
        weight_R1 = tl.load(weight + row_R, mask=row_R < A, other=0.0).to(tl.float32)[:, None]
        dot_RC = tl.zeros((R, C), dtype=tl.float32)
    for start in range(0, F, C):
        column_C = start + tl.arange(0, C)
        mask_RC = (row_R < A)[:, None] & (column_C < F)[None, :]
        index_RC = row_R[:, None] * F + column_C[None, :]
        grad_RC = tl.load(grad + index_RC, mask=mask_RC, other=0.0).to(tl.float32)
        weighted_RC = grad_RC * weight_R1 if WEIGHTED else grad_RC
        if KIND == "swiglu":
            gate_at = h + index_RC + row_R[:, None] * F
            gate_RC = tl.load(gate_at, mask=mask_RC, other=0.0).to(tl.float32)
            value_RC = tl.load(gate_at + F, mask=mask_RC, other=0.0).to(tl.float32)
            s_RC = tl.sigmoid(gate_RC)
            gated_RC = gate_RC * s_RC
            a_RC = gated_RC * value_RC
            dgate_at = dh + index_RC + row_R[:, None] * F
            tl.store(dgate_at, weighted_RC * value_RC * (s_RC + gated_RC * (1 - s_RC)), mask=mask_RC)
            tl.store(dgate_at + F, weighted_RC * gated_RC, mask=mask_RC)
        else:
            x_RC = tl.load(h + index_RC, mask=mask_RC, other=0.0).to(tl.float32)
            s_RC, slope_RC = _gelu_parts(x_RC) if KIND == "gelu" else _silu_parts(x_RC)
            a_RC = x_RC * s_RC
            tl.store(dh + index_RC, weighted_RC * slope_RC, mask=mask_RC)
        if WEIGHTED:
            dot_RC += grad_RC * a_RC
            a_RC *= weight_R1
        tl.store(out + index_RC, a_RC, mask=mask_RC)
    if WEIGHTED:
        tl.store(dweight + row_R, tl.sum(dot_RC, axis=1), mask=row_R < A)


def weighted_activation(h_AH: Tensor, weight_A: Tensor | None, activation: str, out_AF: Tensor) -> None:
    """Write `activation.weighted_activation` into out_AF."""
    if len(out_AF):
        with on_device(h_AH):
            sizes = constants(out_AF.shape[1], activation, weight_A is not None)
            grid = (triton.cdiv(len(out_AF), sizes["R"]),)
            weight = out_AF if weight_A is None else weight_A.contiguous()  # not read without weights
            _activation_forward[grid](h_AH.contiguous(), weight, out_AF, len(out_AF), **sizes)


def weighted_activation_backward_(
    h_AH: Tensor, weight_A: Tensor | None, grad_AF: Tensor, activation: str, dh_AH: Tensor, dweight_A: Tensor
) -> None:
    """Write the gradients into dh_AH and dweight_A, and the weighted activation into grad_AF."""
    assert grad_AF.is_contiguous()
    if len(grad_AF):
        inputs = (h_AH.contiguous(), grad_AF if weight_A is None else weight_A.contiguous(), grad_AF)
        with on_device(h_AH):
            sizes = constants(grad_AF.shape[1], activation, weight_A is not None)
            grid = (triton.cdiv(len(grad_AF), sizes["R"]),)
            # Safe in place: one program reads every element of the gradient before it writes it.
            _activation_backward[grid](*inputs, grad_AF, dh_AH, dweight_A, len(grad_AF), **sizes)


def constants(width: int, activation: str, weighted: bool = True) -> dict[str, int | str]:
    """The constants that the kernels are compiled for: the width, never the number of rows."""
    columns = min(triton.next_power_of_2(width), MAX_COLUMNS)
    return {"F": width, "KIND": activation, "WEIGHTED": weighted, "R": max(1, TILE // columns), "C": columns}
