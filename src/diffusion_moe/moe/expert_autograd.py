"""The experts as one differentiable step that keeps little for the backward pass.

Kept are the input, the first projection's result (unless that too is to be made again) and the routing: no gathered
rows, no activations, no expanded outputs. A routing weight multiplies the activation instead of the output, which is
the same product; so its gradient comes of numbers that the backward pass has anyway. Shape suffixes as in
`products.py`, T tokens, K experts a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import ExpertActivation, weighted_activation, weighted_activation_backward_
from .expert_matmul import products_of
from .ops import sum_rows
from .precision import full_precision, product_dtype
from .routing import Routing, expert_of_rows

KEEP_CAST_BELOW = 512
"""Rows an expert below which the weights' casts are kept for the backward pass."""


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
        start_T = torch.arange(0, num_tokens * per_token, per_token, device=routing.row_TK.device)
        return ByToken(routing.row_TK.flatten(), start_T, per_token)
    # A radix sort on a GPU goes over 32 bits in half as many passes as over 64.
    sorted_A, row_A = torch.sort(routing.token_A.to(torch.int32), stable=True)
    tokens_T = torch.arange(num_tokens, device=row_A.device, dtype=torch.int32)
    return ByToken(row_A, torch.searchsorted(sorted_A, tokens_T), 0)


class ExpertFunction(torch.autograd.Function):
    """The weighted sum of each token's experts: see `experts.GroupedExperts`.

    The products run in `dtype`, or wider where a CPU is faster so (`precision.product_dtype`); what is kept of them is
    in `dtype`. x_TD is kept as it came, for the router keeps that too, and weights of experts are cast again in the
    backward pass rather than kept twice, unless the rows are few: then the casts are a large part of the time, and
    activations small.
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
        """(T, D), as products come. row_A, start_T, per_token: see `ByToken`. equal: see `Routing`.

        dtype: asked of the products. recompute: keep no h.
        """
        wide = product_dtype(x_TD, dtype)
        products = products_of(offsets_E, len(token_A), equal, w_in[0].numel(), wide)
        with full_precision(x_TD):
            x_PD = _rows(x_TD, products.spread(token_A), wide)
            cast_in, cast_out = products.cast(w_in, wide), products.cast(w_out, wide)
            h_PH = products.product(x_PD, cast_in, None if b_in is None else products.cast(b_in, wide)).to(dtype)
            a_PF = weighted_activation(h_PH, products.spread(weight_A), activation, wide)
            out_TD = sum_rows(products.product(a_PF, cast_out), products.places(row_A), start_T, per_token)
            expert_A = weight_TE = None
            if b_out is not None:
                expert_A = expert_of_rows(token_A, offsets_E)
                # The routing weights as a matrix, zero where a token is not sent.
                weight_TE = weight_A.new_zeros(len(x_TD), len(offsets_E)).index_put((token_A, expert_A), weight_A)
                out_TD += (weight_TE @ b_out.to(weight_TE.dtype)).to(wide)
        ctx.activation, ctx.per_token, ctx.products = activation, per_token, products
        ctx.dtype, ctx.wide, ctx.weight_dtype = dtype, wide, w_in.dtype
        ctx.keeps_cast = wide != w_in.dtype and len(token_A) < KEEP_CAST_BELOW * len(w_in)
        if ctx.keeps_cast:
            w_in, w_out = cast_in, cast_out
        kept_PH = None if recompute else h_PH
        parameters = (w_in, w_out, b_in, b_out)
        ctx.save_for_backward(x_TD, weight_A, kept_PH, *parameters, token_A, expert_A, weight_TE, row_A, start_T)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x_TD, weight_A, w_in, w_out, b_in and b_out; None for parameters that are frozen."""
        x_TD, weight_A, h_PH, w_in, w_out, b_in, b_out, token_A, expert_A, weight_TE, row_A, start_T = ctx.saved_tensors
        wide, products = ctx.wide, ctx.products
        needs_x, _, needs_in, needs_out, needs_b_in, needs_b_out = ctx.needs_input_grad[:6]
        dx_TD = dw_in = dw_out = db_in = db_out = None
        with full_precision(x_TD):
            token_P = products.spread(token_A)

            def cast(w: Tensor) -> Tensor:
                return w if ctx.keeps_cast else products.cast(w, wide)

            if h_PH is None:
                bias = None if b_in is None else products.cast(b_in, wide)
                h_PH = products.product(_rows(x_TD, token_P, wide), cast(w_in), bias).to(ctx.dtype)
            dy_PD = _rows(dout_TD, token_P, wide)  # not yet weighted
            a_PF = products.product(dy_PD, cast(w_out).transpose(1, 2))  # till now its gradient
            dh_PH, dweight_P = weighted_activation_backward_(h_PH, products.spread(weight_A), a_PF, ctx.activation)
            dweight_A = products.collect(dweight_P)
            if needs_out:
                dw_out = products.wgrad(a_PF, dy_PD, ctx.weight_dtype)
            del a_PF, dy_PD
            if b_out is not None:
                dout = dout_TD.to(weight_TE.dtype)
                db_out = (weight_TE.T @ dout).to(b_out.dtype) if needs_b_out else None
                along_TE = dout @ b_out.to(dout.dtype).T
                dweight_A = dweight_A + along_TE[token_A, expert_A]
            if needs_in:
                dw_in = products.wgrad(_rows(x_TD, token_P, wide), dh_PH, ctx.weight_dtype)
            if needs_b_in:
                db_in = products.sums(dh_PH).to(b_in.dtype)
            if needs_x:
                dx_PD = products.product(dh_PH, cast(w_in).transpose(1, 2))
                dx_TD = sum_rows(dx_PD, products.places(row_A), start_T, ctx.per_token).to(x_TD.dtype)
        return dx_TD, dweight_A, dw_in, dw_out, db_in, db_out, *[None] * 9


def _rows(x_TD: Tensor, token_P: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row's token, (P, D): cast before they are many, or after where that makes them larger."""
    if dtype.itemsize > x_TD.dtype.itemsize:
        return x_TD.index_select(0, token_P).to(dtype)
    return x_TD.to(dtype).index_select(0, token_P)
