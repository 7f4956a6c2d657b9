"""The dense feed-forward network, of shared experts, dense blocks and capacity predictors.

It is one differentiable function that keeps little for the backward pass: its input and the result of the first
projection. Activation and casts of weights are recomputed. Shape suffixes: T tokens, D width, F width of the hidden
layer, H columns of the first projection (F, or 2F for SwiGLU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .activation import Activation, activated, weighted_activation, weighted_activation_backward_
from .operators import run
from .precision import compute_dtype, exact_linear, full_precision, matmul_dtype


class FeedForward(nn.Module):
    """Two linear layers around tanh-GELU or SiLU, or SwiGLU with a third for the gate.

    Args:
        dim: token width D.
        hidden_dim: width F of the hidden layer.
        activation: "gelu" (tanh form), "silu" or "swiglu".
        bias: add biases to the linear layers.
        dropout: rate of dropout of the hidden layer, in training.
    """

    recompute = False
    """Recompute the hidden layer in the backward pass, so that only the input is kept."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias) if activation == "swiglu" else None
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        for linear in (module for module in self.children() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            if bias:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, use_reentrant=False, preserve_rng_state=bool(self.dropout.p))
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """`forward` without recomputation."""
        x = x.to(compute_dtype(x))  # kept for the backward pass in this dtype
        first = (self.up_proj,) if self.gate_proj is None else (self.gate_proj, self.up_proj)
        if self.dropout.p and self.training:
            return self.down_proj(self.dropout(activated(self.activation, *(linear(x) for linear in first))))
        return feed_forward(x, first, self.down_proj, self.activation)


class CastingLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, so that routers compute in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return exact_linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def feed_forward(x: Tensor, first: Sequence[nn.Linear], last: nn.Linear, activation: str) -> Tensor:
    """last(activation(first(x))), in the dtype that matmuls are asked for in.

    The layers are called one by one where one of them has a hook or was replaced by an adapter, and where nothing is
    kept for a backward pass.

    Args:
        first: one layer, or those of gates and values.
        activation: "gelu" (tanh form), "silu" or "swiglu".
    """
    dtype = compute_dtype(x)
    # A compiler chooses by itself what to recompute, but not the dtype of matmuls.
    keeps_nothing = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    has_asked_dtype = matmul_dtype(x, dtype) == dtype
    if (keeps_nothing and has_asked_dtype) or not all(map(_is_plain, (*first, last))):
        return last(activated(activation, *(linear(x) for linear in first)))
    parameters = [p for linear in (*first, last) for p in (linear.weight, linear.bias)]
    return FeedForwardFunction.apply(x, activation, dtype, *parameters)


def _is_plain(linear: nn.Linear) -> bool:
    """True for a linear layer without hooks, whose `forward` nobody replaced."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) in (nn.Linear, CastingLinear) and not hooked and "forward" not in vars(linear)


class FeedForwardFunction(torch.autograd.Function):
    """Two or three linear layers around an activation: see `feed_forward`.

    Matmuls run in `dtype`, or in float32 where a CPU is faster in it (`precision.matmul_dtype`). What is kept and
    returned has `dtype`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        """Compute the network.

        Args:
            x: tokens, with any leading shape.
            activation: see `feed_forward`.
            dtype: dtype that matmuls are asked for in.
            parameters: weight and bias (or None) of each layer, those of the last layer at the end.
        """
        *first, last_weight, last_bias = parameters
        compute = matmul_dtype(x, dtype)
        with full_precision(x):
            b_H = None if first[1] is None else _stacked(first[1::2], compute)
            h_TH = F.linear(x.flatten(0, -2).to(compute), _stacked(first[::2], compute), b_H).to(dtype)
            a_TF = run(weighted_activation, h_TH, None, activation, compute)
            b_D = None if last_bias is None else last_bias.to(compute)
            y_TD = F.linear(a_TF, last_weight.to(compute), b_D).to(dtype)
        ctx.activation, ctx.compute = activation, compute
        ctx.save_for_backward(x, h_TH, *parameters)
        return y_TD.view(*x.shape[:-1], y_TD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the parameters; None for those that are frozen."""
        x, h_TH, *first, last_weight, last_bias = ctx.saved_tensors
        needs_x, _, _, *needs_first, needs_last, needs_last_bias = ctx.needs_input_grad
        weights, biases, compute = first[::2], first[1::2], ctx.compute
        widths = [len(weight) for weight in weights]
        dx = dlast = dlast_bias = None
        dweights: Sequence[Tensor | None] = [None] * len(weights)
        dbiases: Sequence[Tensor | None] = [None] * len(weights)
        with full_precision(dy):
            x_TD, dy_TD = x.flatten(0, -2).to(compute), dy.flatten(0, -2).to(compute)
            a_TF = dy_TD @ last_weight.to(compute)  # still the gradient; the next line fills it
            dh_TH, _ = run(weighted_activation_backward_, h_TH, None, a_TF, ctx.activation)
            if needs_last:
                dlast = (dy_TD.T @ a_TF).to(last_weight.dtype)
            if needs_last_bias:
                dlast_bias = dy_TD.sum(0).to(last_bias.dtype)
            del a_TF
            if needs_x:
                dx = (dh_TH @ _stacked(weights, compute)).to(x.dtype).view(x.shape)
            if any(needs_first[::2]):
                dweights = (dh_TH.T @ x_TD).to(weights[0].dtype).split(widths)
            if any(needs_first[1::2]):
                dbiases = dh_TH.sum(0).to(biases[0].dtype).split(widths)
        dfirst = [gradient for pair in zip(dweights, dbiases) for gradient in pair]
        return dx, None, None, *dfirst, dlast, dlast_bias


def _stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices or vectors concatenated along the first axis, cast in the same pass."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    heights = [len(part) for part in parts]
    stack = parts[0].new_empty(sum(heights), *parts[0].shape[1:], dtype=dtype)
    for rows, part in zip(stack.split(heights), parts):
        rows.copy_(part)
    return stack
