"""Linear layers in the dtype that is fastest, and on an activation that is made again in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .activation import activated
from .precision import compute_dtype, full_precision, product_dtype


class WideLinear(nn.Linear):
    """Computes in the dtype of its input, whatever that of the weights: a router is in full precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def applied(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x); where a CPU multiplies wider than asked (`precision.product_dtype`), x is kept and y given as asked.

    Where the layer is not the plain one (a hook, an adapter in its place), it is called as it is.
    """
    dtype = compute_dtype(x)
    if product_dtype(x, dtype) == dtype or not _is_plain(linear):
        return linear(x)
    return _WideProduct.apply(x.to(dtype), linear.weight, linear.bias)


class _WideProduct(torch.autograd.Function):
    """A linear layer with its product in float32, whatever the dtype of x_TD, which is kept and the answer's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)
        with full_precision(x):
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with full_precision(grad):
            grad = grad.float()
            flat = grad.flatten(0, -2)
            dx = (grad @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
            dweight = (flat.T @ x.float().flatten(0, -2)).to(weight.dtype)
            dbias = flat.sum(0).to(weight.dtype) if ctx.has_bias else None
        return dx, dweight, dbias


def activated_linear(linear: nn.Linear, activation: str, *inputs: Tensor) -> Tensor:
    """linear(activation(inputs)), keeping the inputs for the backward pass and not the activation.

    Where the layer is not the plain one (a hook, an adapter in its place), it is called as it is.

    Args:
        activation: "gelu" (tanh form) or "silu" of one input, "swiglu" of a gate and a value.
    """
    if torch.compiler.is_compiling() or not _is_plain(linear):  # the compiler decides for itself what to make again
        return applied(linear, activated(activation, *inputs))
    return _ActivatedLinear.apply(linear.weight, linear.bias, activation, compute_dtype(inputs[0]), *inputs)


def _is_plain(linear: nn.Linear) -> bool:
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) in (nn.Linear, WideLinear) and not hooked and "forward" not in vars(linear)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype, *inputs: Tensor
    ) -> Tensor:
        wide = product_dtype(inputs[0], dtype)
        ctx.activation, ctx.dtype, ctx.has_bias = activation, wide, bias is not None
        ctx.save_for_backward(weight, *inputs)
        with full_precision(inputs[0]):
            hidden = activated(activation, *inputs).to(wide)
            return F.linear(hidden, weight.to(wide), None if bias is None else bias.to(wide)).to(dtype)

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
