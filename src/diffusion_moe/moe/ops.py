"""Operators: grouped matmul (rows of x, grouped by expert, times their expert's matrix) and combine (sums by token).

`torch.nn.functional.grouped_mm` does the matmuls where it is fast (`backend.choose_grouped_matmul`), else a Triton
kernel of ours or a loop. grouped_mm takes no float64, fails on unaligned rows and on gradients of stride zero, counts
no FLOPs, and its fake kernel refuses float32; so two operators of ours wrap it. `combine` has no gradient of its own,
because autograd functions call it. Shape suffixes: A rows, T tokens, E experts, D and F widths.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backend import choose_grouped_matmul, takes_triton
from .operators import operator

_ALIGNMENT = 16  # bytes; grouped_mm needs every stride but the unit one to be a multiple of it
MAX_GROUPS = 1023
"""Most experts that grouped_mm takes on CUDA (pytorch, GroupMM.cu)."""
MAX_ELEMENTS = 2**31 - 1
"""Most elements of a tensor that grouped_mm is given on CUDA: beyond, it has read from wrong addresses on an H200
(torchtitan issue 1932)."""
ZERO_FILLING = ("cpu",)
"""Devices on which grouped_mm gives experts without rows a gradient of zero. Elsewhere it may leave memory as it was
(pytorch issues 172439 and 193633)."""


def _kernel(x: Tensor, y: Tensor, groups: int, result: tuple[int, ...]) -> str:
    """The kernel for these operands: `choose_grouped_matmul`'s, or the next where grouped_mm does not take them.

    Args:
        result: shape of the result.
    """
    kernel = choose_grouped_matmul(x.device, x.dtype).kernel
    if kernel != "grouped_mm" or _fits_grouped_mm(x, y, groups, result):
        return kernel
    return "triton" if takes_triton(x) else "loop"


def _fits_grouped_mm(x: Tensor, y: Tensor, groups: int, result: tuple[int, ...]) -> bool:
    has_layout = _has_aligned_matrices(x) and _has_aligned_matrices(y) and _aligned(result[-1], x)
    return has_layout and (x.device.type == "cpu" or _fits_fused_kernel(x, y, groups, result))


def _fits_fused_kernel(x: Tensor, y: Tensor, groups: int, result: tuple[int, ...]) -> bool:
    """True for what grouped_mm's kernel for CUDA takes; layouts aside, which it has in common with a CPU."""
    has_aligned_start = x.data_ptr() % _ALIGNMENT == 0 and y.data_ptr() % _ALIGNMENT == 0
    return has_aligned_start and groups <= MAX_GROUPS and max(x.numel(), y.numel(), math.prod(result)) <= MAX_ELEMENTS


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


@operator("gmm")
def gmm(x_AD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """Grouped matmul: rows of expert e times w_EDF[e].

    Args:
        x_AD: rows, grouped by expert.
        w_EDF: one matrix an expert, any strides.
        offsets_E: end of each group, int32, with offsets_E[-1] == A.

    Returns:
        (A, F), in the dtype of x_AD.
    """
    E, _, columns = w_EDF.shape
    if len(x_AD) == 0:
        return x_AD.new_empty(0, columns)
    kernel = _kernel(x_AD, w_EDF, E, (len(x_AD), columns))
    if kernel == "grouped_mm":
        return F.grouped_mm(x_AD, w_EDF, offs=offsets_E)
    if kernel == "triton":
        from .kernels import grouped_matmul

        return grouped_matmul.gmm(x_AD, w_EDF, offsets_E)
    return gmm_loop(x_AD, w_EDF, offsets_E)


@operator("gmm_wgrad")
def gmm_wgrad(x_AD: Tensor, y_AF: Tensor, offsets_E: Tensor) -> Tensor:
    """The gradient of `gmm` in w_EDF, (E, D, F): expert e's rows of x_AD, transposed, times its rows of y_AF."""
    E, D, columns = len(offsets_E), x_AD.shape[1], y_AF.shape[1]
    if len(x_AD) == 0:
        return x_AD.new_zeros(E, D, columns)
    kernel = _kernel(x_AD, y_AF, E, (E, D, columns))
    if kernel == "grouped_mm":
        dw_EDF = F.grouped_mm(x_AD.T, y_AF, offs=offsets_E)
        if x_AD.device.type not in ZERO_FILLING:
            _zero_empty_(dw_EDF, offsets_E)
        return dw_EDF
    if kernel == "triton":
        from .kernels import grouped_matmul

        return grouped_matmul.gmm_wgrad(x_AD, y_AF, offsets_E)
    return gmm_wgrad_loop(x_AD, y_AF, offsets_E)


def _zero_empty_(dw_EDF: Tensor, offsets_E: Tensor) -> None:
    """Fill the gradients of experts without rows with zeros, without waiting for the device."""
    if takes_triton(dw_EDF):
        from .kernels import grouped_matmul

        grouped_matmul.zero_empty_(dw_EDF, offsets_E)
    else:
        counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
        dw_EDF.masked_fill_((counts_E == 0)[:, None, None], 0)


@operator("combine")
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
