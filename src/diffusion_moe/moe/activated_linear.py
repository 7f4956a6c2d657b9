"""A linear layer on an activation that is made again in the backward pass rather than kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .activation import activated
from .precision import compute_dtype, full_precision


class WideLinear(nn.Linear):
    """Computes in the dtype of its input, whatever that of the weights: a router is in full precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def activated_linear(linear: nn.Linear, activation: str, *inputs: Tensor) -> Tensor:
    """linear(activation(inputs)), keeping the inputs for the backward pass and not the activation.

    Where the layer is not the plain one (a hook, an adapter in its place), it is called as it is.

    Args:
        activation: "gelu" (tanh form) or "silu" of one input, "swiglu" of a gate and a value.
    """
    if torch.compiler.is_compiling() or not _is_plain(linear):  # the compiler decides for itself what to make again
        return linear(activated(activation, *inputs))
    return _ActivatedLinear.apply(linear.weight, linear.bias, activation, compute_dtype(inputs[0]), *inputs)


def _is_plain(linear: nn.Linear) -> bool:
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) in (nn.Linear, WideLinear) and not hooked and "forward" not in vars(linear)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype, *inputs: Tensor
    ) -> Tensor:
        ctx.activation, ctx.dtype, ctx.has_bias = activation, dtype, bias is not None
        ctx.save_for_backward(weight, *inputs)
        with full_precision(inputs[0]):
            hidden = activated(activation, *inputs).to(dtype)
            return F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        dinputs: tuple[Tensor, ...]
        with full_precision(grad):
            grad = grad.to(ctx.dtype)
            flat = grad.flatten(0, -2)
            dhidden = (grad @ weight.to(ctx.dtype)).to(inputs[0].dtype)
            if ctx.activation == "swiglu":
                gate, value = inputs
                gated = F.silu(gate)
                hidden = gated * value
                dinputs = (torch.ops.aten.silu_backward(dhidden * value, gate), dhidden.mul_(gated))
            elif ctx.activation == "gelu":
                hidden = F.gelu(inputs[0], approximate="tanh")
                dinputs = (torch.ops.aten.gelu_backward(dhidden, inputs[0], approximate="tanh"),)
            else:
                hidden = F.silu(inputs[0])
                dinputs = (torch.ops.aten.silu_backward(dhidden, inputs[0]),)
            dweight = (flat.T @ hidden.to(ctx.dtype).flatten(0, -2)).to(weight.dtype)
            dbias = flat.sum(0).to(weight.dtype) if ctx.has_bias else None
        return dweight, dbias, None, None, *dinputs
