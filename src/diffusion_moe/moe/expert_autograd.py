"""All experts as one differentiable function that keeps little for the backward pass.

The function keeps its input, the result of the first matmul (unless that is recomputed too) and the routing. Dispatched
rows, activations and the experts' outputs are not kept. The routing weight multiplies the activation instead of the
expert's output, which gives the same result; its gradient then needs nothing but what the backward pass computes
anyway. Shape suffixes: T tokens, K experts a token, A assignments (rows), D width, E experts, F expert width, H columns
of the first matmul (F for GELU, 2F for SwiGLU: gates first, then values).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import ExpertActivation, weighted_activation, weighted_activation_backward_
from .expert_matmul import BatchedMatmul, GroupedMatmul
from .operators import run
from .ops import combine
from .precision import full_precision, matmul_dtype
from .routing import Routing, expert_of_rows

KEEP_CAST_BELOW = 512
"""Rows an expert below which the cast weights are kept for the backward pass."""


class ExpertWeights(NamedTuple):
    """The parameters of all experts."""

    w_in_EDH: Tensor
    w_out_EFD: Tensor
    b_in_EH: Tensor | None
    b_out_ED: Tensor | None


class ExpertSettings(NamedTuple):
    """The arguments of the experts that are no tensors."""

    activation: ExpertActivation
    dtype: torch.dtype
    """Dtype that matmuls are asked for in (`precision.compute_dtype`); what is kept is in it."""
    recompute: bool
    """Recompute the first matmul in the backward pass instead of keeping its result."""
    equal: bool = False
    """Every expert has the same number of rows; `apply_experts` takes it from the routing."""
    per_token: int = 0
    """See `RowsByToken`; `apply_experts` takes it from the routing."""


class RowsByToken(NamedTuple):
    """The rows of a routing, token by token."""

    row_A: Tensor
    """Rows of token 0, then of token 1 and so on, int64."""
    start_T: Tensor
    """Index in row_A of each token's first row, int64."""
    per_token: int
    """Rows of every token; 0 where that differs."""


def rows_by_token(routing: Routing, num_tokens: int) -> RowsByToken:
    """Group the rows of a routing by token. No host synchronisation."""
    if routing.row_TK is not None:
        per_token = routing.row_TK.shape[1]
        start_T = torch.arange(0, num_tokens * per_token, per_token, device=routing.row_TK.device)
        return RowsByToken(routing.row_TK.flatten(), start_T, per_token)
    # On a GPU a radix sort of 32 bits takes half as many passes as one of 64.
    sorted_A, row_A = torch.sort(routing.token_A.to(torch.int32), stable=True)
    tokens_T = torch.arange(num_tokens, device=row_A.device, dtype=torch.int32)
    return RowsByToken(row_A, torch.searchsorted(sorted_A, tokens_T), 0)


def apply_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights, settings: ExpertSettings) -> Tensor:
    """The weighted sum of each token's experts, (T, D), in the dtype of the matmuls."""
    rows = rows_by_token(routing, len(x_TD))
    settings = settings._replace(equal=routing.equal, per_token=rows.per_token)
    return ExpertFunction.apply(
        x_TD, routing.weight_A, *weights, routing.token_A, routing.offsets_E, rows.row_A, rows.start_T, settings
    )


class ExpertFunction(torch.autograd.Function):
    """The weighted sum of each token's experts: see `apply_experts`.

    x_TD is kept uncast, because the router keeps it too. Weights are cast again in the backward pass instead of being
    kept twice, unless the rows are few: then casts are a large part of the time, and activations are small.
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
        settings: ExpertSettings,
    ) -> Tensor:
        """The arguments are those of `apply_experts`, flat, because autograd looks at tensors only."""
        dtype = matmul_dtype(x_TD, settings.dtype)
        experts = BatchedMatmul(offsets_E) if settings.equal else GroupedMatmul(offsets_E)
        with full_precision(x_TD):
            cast_in, cast_out = w_in.to(dtype), w_out.to(dtype)
            bias = None if b_in is None else b_in.to(dtype)
            # Dispatched rows are freed as soon as they are multiplied.
            h_AH = experts.matmul(_dispatch(x_TD, token_A, dtype), cast_in, bias).to(settings.dtype)
            a_AF = run(weighted_activation, h_AH, weight_A, settings.activation, dtype)
            out_TD = run(combine, experts.matmul(a_AF, cast_out), row_A, start_T, settings.per_token)
            expert_A = weight_TE = None
            if b_out is not None:
                expert_A = expert_of_rows(token_A, offsets_E)
                weight_TE = weight_matrix(weight_A, token_A, expert_A, (len(x_TD), len(offsets_E)))
                out_TD += (weight_TE @ b_out.to(weight_TE.dtype)).to(dtype)
        ctx.settings, ctx.dtype, ctx.experts, ctx.weight_dtype = settings, dtype, experts, w_in.dtype
        if dtype != w_in.dtype and len(token_A) < KEEP_CAST_BELOW * len(w_in):
            w_in, w_out = cast_in, cast_out
        kept_AH = None if settings.recompute else h_AH
        ctx.save_for_backward(
            x_TD, weight_A, kept_AH, w_in, w_out, b_in, b_out, token_A, expert_A, weight_TE, row_A, start_T
        )
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x_TD, weight_A, w_in, w_out, b_in and b_out; None for frozen parameters."""
        x_TD, weight_A, h_AH, w_in, w_out, b_in, b_out, token_A, expert_A, weight_TE, row_A, start_T = ctx.saved_tensors
        settings, dtype, experts = ctx.settings, ctx.dtype, ctx.experts
        needs_x, _, needs_in, needs_out, needs_b_in, needs_b_out = ctx.needs_input_grad[:6]
        dx_TD = dw_in = dw_out = db_in = db_out = None
        with full_precision(x_TD):
            if h_AH is None:  # recompute
                bias = None if b_in is None else b_in.to(dtype)
                h_AH = experts.matmul(_dispatch(x_TD, token_A, dtype), w_in.to(dtype), bias).to(settings.dtype)
            dy_AD = _dispatch(dout_TD, token_A, dtype)  # not yet times the routing weight
            a_AF = experts.matmul(dy_AD, w_out.to(dtype).transpose(1, 2))  # still the gradient; the next line fills it
            dh_AH, dweight_A = run(weighted_activation_backward_, h_AH, weight_A, a_AF, settings.activation)
            if needs_out:
                dw_out = experts.weight_gradient(a_AF, dy_AD, ctx.weight_dtype)
            del a_AF, dy_AD
            if b_out is not None:  # its part of the output is weight_TE @ b_out
                dout = dout_TD.to(weight_TE.dtype)
                db_out = (weight_TE.T @ dout).to(b_out.dtype) if needs_b_out else None
                along_TE = dout @ b_out.to(dout.dtype).T
                dweight_A = dweight_A + along_TE[token_A, expert_A]
            if needs_in:
                dw_in = experts.weight_gradient(_dispatch(x_TD, token_A, dtype), dh_AH, ctx.weight_dtype)
            if needs_b_in:
                db_in = experts.row_sums(dh_AH).to(b_in.dtype)
            if needs_x:
                dx_AD = experts.matmul(dh_AH, w_in.to(dtype).transpose(1, 2))
                dx_TD = run(combine, dx_AD, row_A, start_T, settings.per_token).to(x_TD.dtype)
        return dx_TD, dweight_A, dw_in, dw_out, db_in, db_out, None, None, None, None, None


def weight_matrix(weight_A: Tensor, token_A: Tensor, expert_A: Tensor, shape: tuple[int, int]) -> Tensor:
    """The routing weights as a matrix, (T, E), 0 where a token is not sent to an expert."""
    return weight_A.new_zeros(shape).index_put((token_A, expert_A), weight_A)


class WeightedActivation(torch.autograd.Function):
    """`activation.weighted_activation` with its gradient, for experts with dropout."""

    @staticmethod
    def forward(ctx: Any, h_AH: Tensor, weight_A: Tensor, activation: ExpertActivation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(h_AH, weight_A)
        return run(weighted_activation, h_AH, weight_A, activation, h_AH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da_AF: Tensor) -> tuple[Tensor | None, ...]:
        h_AH, weight_A = ctx.saved_tensors
        overwritten_AF = da_AF.clone(memory_format=torch.contiguous_format)
        dh_AH, dweight_A = run(weighted_activation_backward_, h_AH, weight_A, overwritten_AF, ctx.activation)
        return dh_AH, dweight_A, None


def _dispatch(x_TD: Tensor, token_A: Tensor, dtype: torch.dtype) -> Tensor:
    """The token of each row, (A, D), in `dtype`. Casts on the side of the gather where the tensor is smaller."""
    if dtype.itemsize > x_TD.dtype.itemsize:
        return x_TD.index_select(0, token_A).to(dtype)
    return x_TD.to(dtype).index_select(0, token_A)
