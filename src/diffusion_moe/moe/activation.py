"""The activation of experts, weighted by their routing, and of ordinary networks: one pass forward, one backward.

On a GPU each is one kernel (`kernels.activation`), in float32 inside. On a CPU the experts' run over blocks of rows
that stay in the cache, in float32 too: faster than operator by operator in bfloat16, and exact; without weights torch's
own operators are as fast. Shape suffixes: A rows, F width of the hidden layer, H columns of the first projection (F for
GELU and SiLU, 2F for SwiGLU: gates first, then values).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import takes_triton

ExpertActivation = Literal["gelu", "swiglu"]
Activation = Literal["gelu", "silu", "swiglu"]
GELU_LINE = 2 * math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715 * GELU_LINE
BLOCK = 2**18
"""Numbers of width F in a block on a CPU: with its temporaries about a core's second-level cache."""


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


@torch.library.custom_op("diffusion_moe::weighted_activation", mutates_args=())
def weighted_activation(h_AH: Tensor, weight_A: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """activate(h) times each row's weight if there are any, (A, F), in `dtype`. Weighted rows know no SiLU."""
    if weight_A is None and not takes_triton(h_AH):
        return activate(h_AH.to(dtype), activation)
    out_AF = h_AH.new_empty(len(h_AH), _width(h_AH, activation), dtype=dtype)
    if takes_triton(h_AH):
        from .kernels import activation as kernel

        kernel.weighted_activation(h_AH, weight_A, activation, out_AF)
        return out_AF
    assert weight_A is not None
    for rows in _blocks(out_AF):
        h = _wide(h_AH[rows])
        a = gelu(h) if activation == "gelu" else activate(h, activation)
        out_AF[rows] = a.mul_(weight_A[rows, None])
    return out_AF


@torch.library.custom_op("diffusion_moe::weighted_activation_backward_", mutates_args=("grad_AF",))
def weighted_activation_backward_(
    h_AH: Tensor, weight_A: Tensor | None, grad_AF: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """What the backward pass needs of an activation, which is made again rather than kept.

    Args:
        grad_AF: the gradient of the weighted activation, contiguous; the weighted activation takes its place.

    Returns:
        The gradient of h (A, H), in the dtype of grad_AF; that of the weights (A,), empty without any.
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
        h, grad, weight = _wide(h_AH[rows]), _wide(grad_AF[rows]), weight_A[rows, None]
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
    """`weighted_activation_backward_` without weights, operator by operator; all in one dtype."""
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
    """tanh-GELU, as h sigmoid(z) with z = 2 sqrt(2 / pi) (h + 0.044715 h^3): the same, for 1 + tanh(z / 2) is
    2 sigmoid(z). On a CPU a sigmoid takes a fraction of a tanh's time (docs/log.md)."""
    return _line(h.square(), GELU_CUBE).mul_(h).sigmoid_().mul_(h)


def gelu_and_slope(h: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu` and its derivative, sigmoid(z) + h sigmoid(z) (1 - sigmoid(z)) dz/dh."""
    square = h.square()
    gate = _line(square, GELU_CUBE).mul_(h).sigmoid_()
    a = h * gate
    return a, torch.addcmul(gate, torch.addcmul(a, a, gate, value=-1), _line(square, 3 * GELU_CUBE))


def _line(square: Tensor, cube: float) -> Tensor:
    """GELU_LINE + cube * square, in one pass."""
    return torch.add(square.new_full((), GELU_LINE), square, alpha=cube)


def _width(h_AH: Tensor, activation: str) -> int:
    return h_AH.shape[1] // (2 if activation == "swiglu" else 1)


def _wide(x: Tensor) -> Tensor:
    """A copy of its own in float32 (or float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _blocks(x_AF: Tensor) -> Iterator[slice]:
    """Slices of rows: small ones on a CPU, one elsewhere."""
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
