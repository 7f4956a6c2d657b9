"""An ordinary feed-forward network as one differentiable step that keeps little for the backward pass.

Kept are the input and the first projection's result; the activation and casts of weights are made again. Shape
suffixes: T tokens, D width, F width of the hidden layer, H columns of the first projection (F, or 2F for SwiGLU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .activation import activated, weighted_activation, weighted_activation_backward_
from .precision import compute_dtype, full_precision, matmul_dtype


class WideLinear(nn.Linear):
    """Computes in the dtype of its input, whatever that of the weights: a router is in full precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def feed_forward(x: Tensor, first: Sequence[nn.Linear], last: nn.Linear, activation: str) -> Tensor:
    """last(activation(first(x))), in the dtype that products are asked for in.

    Where a layer is not the plain one (a hook, an adapter in its place), all are called as they are; so they are where
    nothing is to be kept.

    Args:
        first: one layer, or those of gates and values. activation: "gelu" (tanh form), "silu" or "swiglu".
    """
    dtype = compute_dtype(x)
    # A compiler decides for itself what to make again, but not what to multiply in.
    keeps_nothing = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    as_asked = matmul_dtype(x, dtype) == dtype
    if (keeps_nothing and as_asked) or not all(map(_is_plain, (*first, last))):
        return last(activated(activation, *(linear(x) for linear in first)))
    parameters = [p for linear in (*first, last) for p in (linear.weight, linear.bias)]
    return FeedForwardFunction.apply(x, activation, dtype, *parameters)


def _is_plain(linear: nn.Linear) -> bool:
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) in (nn.Linear, WideLinear) and not hooked and "forward" not in vars(linear)


class FeedForwardFunction(torch.autograd.Function):
    """Two or three linear layers around an activation: see `feed_forward`.

    Products run in `dtype`, or wider where a CPU is faster so (`precision.matmul_dtype`); what is kept and answered is
    in `dtype`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        """x: any leading shape. parameters: weight and bias (or None) of each layer, the last one's at the end."""
        *first, last_weight, last_bias = parameters
        wide = matmul_dtype(x, dtype)
        with full_precision(x):
            b_H = None if first[1] is None else _stacked(first[1::2], wide)
            h_TH = F.linear(x.flatten(0, -2).to(wide), _stacked(first[::2], wide), b_H).to(dtype)
            a_TF = weighted_activation(h_TH, None, activation, wide)
            b_D = None if last_bias is None else last_bias.to(wide)
            y_TD = F.linear(a_TF, last_weight.to(wide), b_D).to(dtype)
        ctx.activation, ctx.wide = activation, wide
        ctx.save_for_backward(x, h_TH, *parameters)
        return y_TD.view(*x.shape[:-1], y_TD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the parameters; None for those that are frozen."""
        x, h_TH, *first, last_weight, last_bias = ctx.saved_tensors
        needs_x, _, _, *needs_first, needs_last, needs_last_bias = ctx.needs_input_grad
        weights, biases, wide = first[::2], first[1::2], ctx.wide
        widths = [len(weight) for weight in weights]
        dx = dlast = dlast_bias = None
        dweights: Sequence[Tensor | None] = [None] * len(weights)
        dbiases: Sequence[Tensor | None] = [None] * len(weights)
        with full_precision(dy):
            x_TD, dy_TD = x.flatten(0, -2).to(wide), dy.flatten(0, -2).to(wide)
            a_TF = dy_TD @ last_weight.to(wide)  # till the next line its gradient
            dh_TH, _ = weighted_activation_backward_(h_TH, None, a_TF, ctx.activation)
            if needs_last:
                dlast = (dy_TD.T @ a_TF).to(last_weight.dtype)
            if needs_last_bias:
                dlast_bias = dy_TD.sum(0).to(last_bias.dtype)
            del a_TF
            if needs_x:
                dx = (dh_TH @ _stacked(weights, wide)).to(x.dtype).view(x.shape)
            if any(needs_first[::2]):
                dweights = (dh_TH.T @ x_TD).to(weights[0].dtype).split(widths)
            if any(needs_first[1::2]):
                dbiases = dh_TH.sum(0).to(biases[0].dtype).split(widths)
        dfirst = [gradient for pair in zip(dweights, dbiases) for gradient in pair]
        return dx, None, None, *dfirst, dlast, dlast_bias


def _stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One below the other, cast on the way."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    heights = [len(part) for part in parts]
    stack = parts[0].new_empty(sum(heights), *parts[0].shape[1:], dtype=dtype)
    for place, part in zip(stack.split(heights), parts):
        place.copy_(part)
    return stack
