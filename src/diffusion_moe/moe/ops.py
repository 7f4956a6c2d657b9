"""Operators: grouped matmul (rows of x, grouped by expert, times their expert's matrix) and combine (sums by token).

`torch.nn.functional.grouped_mm` does the matmuls where it can. It takes no float64, fails on unaligned rows and on
gradients of stride zero, counts no FLOPs, and its fake kernel refuses float32. Two operators of ours wrap it and fall
back on a loop. `combine` has no gradient of its own, because autograd functions call it. Shape suffixes: A rows, T
tokens, E experts, D and F widths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import takes_triton

_ALIGNMENT = 16  # bytes; grouped_mm needs every stride but the unit one to be a multiple of it


def _takes_grouped_mm(*operands: Tensor) -> bool:
    return all(x.dtype in (torch.bfloat16, torch.float32) and _has_aligned_matrices(x) for x in operands)


def _has_aligned_matrices(x: Tensor) -> bool:
    """True for a row-major or column-major layout without overlap whose larger strides are aligned."""
    unit = _ALIGNMENT // x.element_size()
    *outer_strides, row_stride, column_stride = x.stride()
    rows, columns = x.shape[-2:]
    row_major = column_stride == 1 and row_stride >= columns and row_stride % unit == 0
    column_major = row_stride == 1 and column_stride >= rows and column_stride % unit == 0
    return (row_major or column_major) and all(stride % unit == 0 for stride in outer_strides)


def _aligned(columns: int, x: Tensor) -> bool:
    """True where a result of that width needs no padding, as the fake kernels promise."""
    return columns * x.element_size() % _ALIGNMENT == 0


@torch.library.custom_op("diffusion_moe::gmm", mutates_args=())
def gmm(x_AD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """Grouped matmul: rows of expert e times w_EDF[e].

    Args:
        x_AD: rows, grouped by expert.
        w_EDF: one matrix an expert, any strides.
        offsets_E: end of each group, int32, with offsets_E[-1] == A.

    Returns:
        (A, F), in the dtype of x_AD.
    """
    if len(x_AD) == 0:
        return x_AD.new_empty(0, w_EDF.shape[2])
    if _takes_grouped_mm(x_AD, w_EDF) and _aligned(w_EDF.shape[2], x_AD):
        return F.grouped_mm(x_AD, w_EDF, offs=offsets_E)
    return gmm_loop(x_AD, w_EDF, offsets_E)


@torch.library.custom_op("diffusion_moe::gmm_wgrad", mutates_args=())
def gmm_wgrad(x_AD: Tensor, y_AF: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient of `gmm` in w_EDF, (E, D, F): expert e's rows of x_AD, transposed, times its rows of y_AF."""
    if len(x_AD) == 0:
        return x_AD.new_zeros(len(offsets_E), x_AD.shape[1], y_AF.shape[1])
    if _takes_grouped_mm(x_AD, y_AF) and _aligned(y_AF.shape[1], y_AF):
        return F.grouped_mm(x_AD.T, y_AF, offs=offsets_E)
    return gmm_wgrad_loop(x_AD, y_AF, offsets_E)


@torch.library.custom_op("diffusion_moe::combine", mutates_args=())
def combine(y_AD: Tensor, row_A: Tensor, start_T: Tensor, per_token: int = 0) -> Tensor:
    """The sum of each token's rows, (T, D), accumulated in float32 in a fixed order; zero for a token with none.

    Args:
        y_AD: rows, in any order.
        row_A: rows of token 0, then of token 1 and so on, int64.
        start_T: index in row_A of each token's first row, int64.
        per_token: rows of every token; 0 where that differs.
    """
    if len(y_AD) == 0:
        return y_AD.new_zeros(len(start_T), y_AD.shape[1])
    if takes_triton(y_AD):
        from .kernels import combine as kernel

        return kernel.combine(y_AD, row_A, start_T, per_token)
    return F.embedding_bag(row_A, y_AD, start_T, mode="sum")


def gmm_loop(x_AD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """`gmm` as a plain loop over experts: the oracle, and what float64 uses."""
    ends = offsets_E.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([x_AD[start:end] @ w_EDF[e] for e, (start, end) in enumerate(zip(starts, ends))])


def gmm_wgrad_loop(x_AD: Tensor, y_AF: Tensor, offsets_E: Tensor) -> Tensor:
    """`gmm_wgrad` as a plain loop over experts."""
    ends = offsets_E.tolist()
    starts = [0, *ends[:-1]]
    return torch.stack([x_AD[start:end].T @ y_AF[start:end] for start, end in zip(starts, ends)])


@gmm.register_fake
def _(x_AD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    return x_AD.new_empty(x_AD.shape[0], w_EDF.shape[2])


@gmm_wgrad.register_fake
def _(x_AD: Tensor, y_AF: Tensor, offsets_E: Tensor) -> Tensor:
    return x_AD.new_empty(offsets_E.shape[0], x_AD.shape[1], y_AF.shape[1])


@combine.register_fake
def _(y_AD: Tensor, row_A: Tensor, start_T: Tensor, per_token: int = 0) -> Tensor:
    return y_AD.new_empty(start_T.shape[0], y_AD.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gmm_backward(ctx: Any, dy_AF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_AD, w_EDF, offsets_E = ctx.saved_tensors
    dy_AF = dy_AF.contiguous()  # the gradient of a sum has stride 0, which grouped_mm refuses
    dx_AD = gmm(dy_AF, w_EDF.transpose(1, 2), offsets_E) if ctx.needs_input_grad[0] else None
    dw_EDF = gmm_wgrad(x_AD, dy_AF, offsets_E) if ctx.needs_input_grad[1] else None
    return dx_AD, dw_EDF, None


def _gmm_wgrad_backward(ctx: Any, dw_EDF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_AD, y_AF, offsets_E = ctx.saved_tensors
    dw_EDF = dw_EDF.contiguous()
    dx_AD = gmm(y_AF, dw_EDF.transpose(1, 2), offsets_E) if ctx.needs_input_grad[0] else None
    dy_AF = gmm(x_AD, dw_EDF, offsets_E) if ctx.needs_input_grad[1] else None
    return dx_AD, dy_AF, None


gmm.register_autograd(_gmm_backward, setup_context=_save)
gmm_wgrad.register_autograd(_gmm_wgrad_backward, setup_context=_save)


# Every row is multiplied by one D x F matrix, whatever the grouping.
@register_flop_formula(torch.ops.diffusion_moe.gmm)
def _gmm_flop(x_shape: Any, w_shape: Any, offsets_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * w_shape[1] * w_shape[2]


@register_flop_formula(torch.ops.diffusion_moe.gmm_wgrad)
def _gmm_wgrad_flop(x_shape: Any, y_shape: Any, offsets_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * y_shape[1]
