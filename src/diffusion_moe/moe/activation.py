"""The activation of experts, times the routing weights, and of dense networks: one pass forward, one backward.

On a GPU each pass is one kernel (`kernels.activation`) with float32 arithmetic. On a CPU the experts' activation runs
in float32 over blocks of rows that fit the cache, which is faster than operator by operator in bfloat16, and exact.
Without weights torch's own operators are as fast. Shape suffixes: A rows, F width of the hidden layer, H columns of the
first projection (F for GELU and SiLU, 2F for SwiGLU: gates first, then values).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import takes_triton
from .operators import operator

ExpertActivation = Literal["gelu", "swiglu"]
Activation = Literal["gelu", "silu", "swiglu"]
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715 * GELU_LINEAR
"""Coefficients of z = 2 sqrt(2 / pi) (h + 0.044715 h^3)."""
BLOCK = 2**18
"""Elements (rows times F) of a block on a CPU; with its temporaries it fills a core's second-level cache."""


def activate(h_AH: Tensor, activation: str) -> Tensor:
    """(A, H) to (A, F): tanh-GELU, SiLU, or silu(gate) * value."""
    return activated(activation, *(h_AH.chunk(2, dim=-1) if activation == "swiglu" else (h_AH,)))


def activated(activation: str, *inputs: Tensor) -> Tensor:
    """tanh-GELU ("gelu") or SiLU ("silu") of one input, or silu(gate) * value ("swiglu") of two."""
    if activation == "swiglu":
        gate, value = inputs
        return F.silu(gate) * value
    (x,) = inputs
    return F.gelu(x, approximate="tanh") if activation == "gelu" else F.silu(x)


@operator("weighted_activation")
def weighted_activation(h_AH: Tensor, weight_A: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """activate(h), times each row's weight if given, (A, F), in `dtype`. SiLU is not supported with weights."""
    if weight_A is None and not takes_triton(h_AH):
        return activate(h_AH.to(dtype), activation)
    out_AF = h_AH.new_empty(len(h_AH), _width(h_AH, activation), dtype=dtype)
    if takes_triton(h_AH):
        from .kernels import activation as kernel

        kernel.weighted_activation(h_AH, weight_A, activation, out_AF)
        return out_AF
    assert weight_A is not None
    for rows in _blocks(out_AF):
        h = _float32_copy(h_AH[rows])
        a = gelu(h) if activation == "gelu" else activate(h, activation)
        out_AF[rows] = a.mul_(weight_A[rows, None])
    return out_AF


@operator("weighted_activation_backward_", mutates_args=("grad_AF",))
def weighted_activation_backward_(
    h_AH: Tensor, weight_A: Tensor | None, grad_AF: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Backward pass of `weighted_activation`, which also recomputes the weighted activation.

    Args:
        grad_AF: gradient of the weighted activation, contiguous; overwritten with the weighted activation itself.

    Returns:
        The gradient of h (A, H), in the dtype of grad_AF, and that of the weights (A,), empty without weights.
    """
    assert weight_A is None or activation != "silu"
    dh_AH = grad_AF.new_empty(h_AH.shape)
    dweight_A = grad_AF.new_empty(0) if weight_A is None else weight_A.new_empty(weight_A.shape)
    if takes_triton(h_AH, grad_AF):
        from .kernels import activation as kernel

        kernel.weighted_activation_backward_(h_AH, weight_A, grad_AF, activation, dh_AH, dweight_A)
        return dh_AH, dweight_A
    if weight_A is None:
        _backward_(h_AH.to(grad_AF.dtype), grad_AF, activation, dh_AH)
        return dh_AH, dweight_A
    width = grad_AF.shape[1]
    for rows in _blocks(grad_AF):
        h, grad = _float32_copy(h_AH[rows]), _float32_copy(grad_AF[rows])
        weight = weight_A[rows, None]
        if activation == "gelu":
            a, slope = gelu_and_slope(h)
            dweight_A[rows] = torch.linalg.vecdot(grad, a).to(weight_A.dtype)
            grad_AF[rows] = a.mul_(weight)
            dh_AH[rows] = grad.mul_(weight).mul_(slope)
        else:
            gate, value = h.chunk(2, dim=-1)
            gated = F.silu(gate)
            a = gated * value
            dweight_A[rows] = torch.linalg.vecdot(grad, a).to(weight_A.dtype)
            grad_AF[rows] = a.mul_(weight)
            grad.mul_(weight)
            dh_AH[rows, width:] = gated.mul_(grad)
            dh_AH[rows, :width] = torch.ops.aten.silu_backward(grad.mul_(value), gate)
    return dh_AH, dweight_A


def _backward_(h_AH: Tensor, grad_AF: Tensor, activation: str, dh_AH: Tensor) -> None:
    """`weighted_activation_backward_` without weights, operator by operator, with all tensors in one dtype."""
    if activation == "swiglu":
        gate, value = h_AH.chunk(2, dim=-1)
        dgate, dvalue = dh_AH.chunk(2, dim=-1)
        gated = F.silu(gate)
        torch.mul(gated, grad_AF, out=dvalue)
        torch.ops.aten.silu_backward.grad_input(grad_AF.mul_(value), gate, grad_input=dgate)
        torch.mul(gated, value, out=grad_AF)
    elif activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(grad_AF, h_AH, approximate="tanh", grad_input=dh_AH)
        torch.ops.aten.gelu.out(h_AH, approximate="tanh", out=grad_AF)
    else:
        torch.ops.aten.silu_backward.grad_input(grad_AF, h_AH, grad_input=dh_AH)
        torch.ops.aten.silu.out(h_AH, out=grad_AF)


def gelu(h: Tensor) -> Tensor:
    """tanh-GELU, as h sigmoid(z) with z = 2 sqrt(2 / pi) (h + 0.044715 h^3).

    The two are equal because 1 + tanh(z / 2) = 2 sigmoid(z). A sigmoid is much faster on a CPU (docs/log.md).
    """
    return _linear_in(h.square(), GELU_CUBIC).mul_(h).sigmoid_().mul_(h)


def gelu_and_slope(h: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu` and its derivative, sigmoid(z) + h sigmoid(z) (1 - sigmoid(z)) dz/dh."""
    square = h.square()
    gate = _linear_in(square, GELU_CUBIC).mul_(h).sigmoid_()
    a = h * gate
    return a, torch.addcmul(gate, torch.addcmul(a, a, gate, value=-1), _linear_in(square, 3 * GELU_CUBIC))


def _linear_in(square: Tensor, slope: float) -> Tensor:
    """GELU_LINEAR + slope * square, in one pass."""
    return torch.add(square.new_full((), GELU_LINEAR), square, alpha=slope)


def _width(h_AH: Tensor, activation: str) -> int:
    return h_AH.shape[1] // (2 if activation == "swiglu" else 1)


def _float32_copy(x: Tensor) -> Tensor:
    """A new tensor in float32 (float64 stays float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _blocks(x_AF: Tensor) -> Iterator[slice]:
    """Slices of rows: small ones on a CPU, a single one elsewhere."""
    rows = max(1, BLOCK // x_AF.shape[1]) if x_AF.device.type == "cpu" else max(1, len(x_AF))
    for start in range(0, len(x_AF), rows):
        yield slice(start, start + rows)


@weighted_activation.register_fake
def _(h_AH: Tensor, weight_A: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    return h_AH.new_empty(h_AH.shape[0], _width(h_AH, activation), dtype=dtype)


@weighted_activation_backward_.register_fake
def _(h_AH: Tensor, weight_A: Tensor | None, grad_AF: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dweight_A = grad_AF.new_empty(0) if weight_A is None else weight_A.new_empty(weight_A.shape)
    return grad_AF.new_empty(h_AH.shape), dweight_A
