"""The experts as one differentiable step that keeps little for the backward pass.

Kept are the input, the first projection's result (unless that too is to be made again) and the routing: no gathered
rows, no activations, no expanded outputs. A routing weight multiplies the activation instead of the output, which is
the same product; so its gradient comes of numbers that the backward pass has anyway. Shape suffixes as in
`experts.py`, T tokens, K experts a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import ExpertActivation, weighted_activation, weighted_activation_backward_
from .ops import expert_blocks, gmm, gmm_wgrad, sum_rows
from .precision import full_precision
from .routing import Routing, expert_of_rows

KEEP_CAST_BELOW = 512
"""Rows an expert below which the weights' casts are kept for the backward pass."""
ONES = 8
"""Columns of ones whose product gives sums of rows; as many as grouped_mm's alignment asks for."""


class ByToken(NamedTuple):
    """The rows of a routing, token by token."""

    row_A: Tensor
    """Rows of token 0, then of token 1 and so on, int64."""
    start_T: Tensor
    """Where each token's rows begin in row_A, int64."""
    per_token: int
    """Rows of every token; 0 where that differs."""


def by_token(routing: Routing, num_tokens: int) -> ByToken:
    """Group rows by token; no synchronisation."""
    if routing.row_TK is not None:
        per_token = routing.row_TK.shape[1]
        start_T = torch.arange(num_tokens, device=routing.row_TK.device) * per_token
        return ByToken(routing.row_TK.flatten(), start_T, per_token)
    sorted_A, row_A = torch.sort(routing.token_A, stable=True)
    return ByToken(row_A, torch.searchsorted(sorted_A, torch.arange(num_tokens, device=row_A.device)), 0)


class ExpertFunction(torch.autograd.Function):
    """The weighted sum of each token's experts: see `experts.GroupedExperts`.

    The products run in `dtype`. x_TD is kept as it came, for the router keeps that too, and weights of experts are cast
    again in the backward pass rather than kept twice, unless the rows are few: then the casts are a large part of the
    time, and activations small.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_A: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        b_out: Tensor | None,
        token_A: Tensor,
        offsets_E: Tensor,
        row_A: Tensor,
        start_T: Tensor,
        per_token: int,
        activation: ExpertActivation,
        equal: bool,
        dtype: torch.dtype,
        recompute: bool,
    ) -> Tensor:
        """(T, D), in `dtype`. row_A, start_T, per_token: see `ByToken`. equal: see `Routing`. recompute: keep no h."""
        with full_precision(x_TD):
            x_AD = x_TD.to(dtype).index_select(0, token_A)
            cast_in, cast_out = w_in.to(dtype), w_out.to(dtype)
            h_AH = product(x_AD, cast_in, offsets_E, equal, None if b_in is None else b_in.to(dtype))
            a_AF = weighted_activation(h_AH, weight_A, activation)
            out_TD = sum_rows(product(a_AF, cast_out, offsets_E, equal), row_A, start_T, per_token)
            if b_out is not None:
                weight_TE = _by_token_and_expert(weight_A, token_A, offsets_E, len(x_TD))
                out_TD += (weight_TE @ b_out.to(weight_TE.dtype)).to(dtype)
        ctx.activation, ctx.per_token, ctx.equal = activation, per_token, equal
        ctx.dtype, ctx.weight_dtype = dtype, w_in.dtype
        if len(token_A) < KEEP_CAST_BELOW * len(w_in):
            w_in, w_out = cast_in, cast_out
        kept_AH = None if recompute else h_AH
        ctx.save_for_backward(x_TD, weight_A, kept_AH, w_in, w_out, b_in, b_out, token_A, offsets_E, row_A, start_T)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x_TD, weight_A, w_in, w_out, b_in and b_out."""
        x_TD, weight_A, h_AH, w_in, w_out, b_in, b_out, token_A, offsets_E, row_A, start_T = ctx.saved_tensors
        dtype, equal = ctx.dtype, ctx.equal
        dx_TD = db_in = db_out = None
        with full_precision(x_TD):
            if h_AH is None:
                bias = None if b_in is None else b_in.to(dtype)
                h_AH = product(x_TD.to(dtype).index_select(0, token_A), w_in.to(dtype), offsets_E, equal, bias)
            dy_AD = dout_TD.to(dtype).index_select(0, token_A)  # of the rows, not yet weighted
            a_AF = product(dy_AD, w_out.to(dtype).transpose(1, 2), offsets_E, equal)  # till now its gradient
            dh_AH, dweight_A = weighted_activation_backward_(h_AH, weight_A, a_AF, ctx.activation)
            dw_out = product_wgrad(a_AF, dy_AD, offsets_E, equal, ctx.weight_dtype)
            del a_AF, dy_AD
            if b_out is not None:
                weight_TE = _by_token_and_expert(weight_A, token_A, offsets_E, len(x_TD))
                dout = dout_TD.to(weight_TE.dtype)
                db_out = (weight_TE.T @ dout).to(b_out.dtype)
                along_TE = dout @ b_out.to(dout.dtype).T
                dweight_A = dweight_A + along_TE[token_A, expert_of_rows(token_A, offsets_E)]
            x_AD = x_TD.to(dtype).index_select(0, token_A)
            dw_in = product_wgrad(x_AD, dh_AH, offsets_E, equal, ctx.weight_dtype)
            del x_AD
            if b_in is not None:
                db_in = sum_by_expert(dh_AH, offsets_E, equal).to(b_in.dtype)
            if ctx.needs_input_grad[0]:
                dx_AD = product(dh_AH, w_in.to(dtype).transpose(1, 2), offsets_E, equal)
                dx_TD = sum_rows(dx_AD, row_A, start_T, ctx.per_token).to(x_TD.dtype)
        return dx_TD, dweight_A, dw_in, dw_out, db_in, db_out, *[None] * 9


def product(x_AD: Tensor, w_EDF: Tensor, offsets_E: Tensor, equal: bool, bias_EF: Tensor | None = None) -> Tensor:
    """Every row times its expert's matrix, (A, F); one batched product where all experts have as many rows."""
    if equal:
        x_ECD = x_AD.view(len(w_EDF), -1, x_AD.shape[1])
        y_ECF = x_ECD.bmm(w_EDF) if bias_EF is None else torch.baddbmm(bias_EF[:, None], x_ECD, w_EDF)
        return y_ECF.flatten(0, 1)
    y_AF = gmm(x_AD, w_EDF, offsets_E)
    if bias_EF is not None:
        y_AF += bias_EF.index_select(0, expert_of_rows(x_AD, offsets_E))
    return y_AF


def product_wgrad(x_AD: Tensor, y_AF: Tensor, offsets_E: Tensor, equal: bool, dtype: torch.dtype) -> Tensor:
    """The gradient of `product` in the matrices, (E, D, F), in that dtype."""
    if not equal:
        return gmm_wgrad(x_AD, y_AF, offsets_E, dtype)
    E, D, F = len(offsets_E), x_AD.shape[1], y_AF.shape[1]
    x_EDC, y_ECF = x_AD.view(E, -1, D).transpose(1, 2), y_AF.view(E, -1, F)
    if dtype == x_AD.dtype:
        return x_EDC.bmm(y_ECF)
    wide_EDF = x_AD.new_empty(E, D, F, dtype=dtype)
    for experts in expert_blocks(wide_EDF):
        wide_EDF[experts] = x_EDC[experts].bmm(y_ECF[experts])
    return wide_EDF


def sum_by_expert(y_AF: Tensor, offsets_E: Tensor, equal: bool) -> Tensor:
    """The sum of each expert's rows, (E, F)."""
    if equal:
        return y_AF.view(len(offsets_E), -1, y_AF.shape[1]).sum(1)
    return gmm_wgrad(y_AF.new_ones(len(y_AF), ONES), y_AF, offsets_E)[:, 0]


def _by_token_and_expert(weight_A: Tensor, token_A: Tensor, offsets_E: Tensor, num_tokens: int) -> Tensor:
    """The routing weights as a matrix (T, E), zero where a token is not sent."""
    weight_TE = weight_A.new_zeros(num_tokens, len(offsets_E))
    return weight_TE.index_put((token_A, expert_of_rows(token_A, offsets_E)), weight_A)
