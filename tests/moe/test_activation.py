"""The one-pass activation against autograd on the plain formula."""

import pytest
import torch

from diffusion_moe.moe import activation as module
from diffusion_moe.moe.activation import (
    activate,
    gelu,
    gelu_and_slope,
    weighted_activation,
    weighted_activation_backward_,
)


def backward(h_AH, weight_A, grad_AF, kind):
    """The weighted activation and both gradients; the gradient given is left alone."""
    out_AF = grad_AF.clone(memory_format=torch.contiguous_format)
    return out_AF, *weighted_activation_backward_(h_AH, weight_A, out_AF, kind)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_are_those_of_the_formula(kind, block, dtype, monkeypatch):
    """In blocks of one row, of a few with a rest, and of all; bfloat16 rounds the results and nothing before."""
    monkeypatch.setattr(module, "BLOCK", block)
    F = 6
    h_AH = torch.randn(23, 2 * F if kind == "swiglu" else F).to(dtype)
    weight_A, grad_AF = torch.rand(23).to(torch.promote_types(dtype, torch.float32)), torch.randn(23, F).to(dtype)
    exact_h, exact_w = h_AH.double().requires_grad_(), weight_A.double().requires_grad_()
    expected = activate(exact_h, kind) * exact_w[:, None]
    gradients = torch.autograd.grad(expected, (exact_h, exact_w), grad_AF.double())
    bound = {"rtol": 4e-3 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    forward = weighted_activation(h_AH, weight_A, kind, h_AH.dtype)
    again, dh_AH, dweight_A = backward(h_AH, weight_A, grad_AF, kind)
    assert forward.dtype == dh_AH.dtype == dtype and torch.equal(again, forward)
    torch.testing.assert_close(forward.double(), expected, **bound)
    torch.testing.assert_close(dh_AH.double(), gradients[0], **bound)
    torch.testing.assert_close(dweight_A.double(), gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_low_precision_inputs_are_computed_in_float32(kind):
    """h in bfloat16 and all else in float32: only h is rounded."""
    F = 6
    h_AH = torch.randn(23, 2 * F if kind == "swiglu" else F).bfloat16()
    weight_A, grad_AF = torch.rand(23), torch.randn(23, F)
    expected = backward(h_AH.float(), weight_A, grad_AF, kind)
    assert all(map(torch.equal, backward(h_AH, weight_A, grad_AF, kind), expected))
    assert torch.equal(weighted_activation(h_AH, weight_A, kind, torch.float32), expected[0])
    torch.library.opcheck(weighted_activation, (h_AH, weight_A, kind, torch.float32))
    torch.library.opcheck(weighted_activation_backward_, (h_AH, weight_A, grad_AF, kind))


@pytest.mark.parametrize("kind", ["gelu", "silu", "swiglu"])
@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_without_weights_it_is_the_activation(kind, kept):
    """h may have a lower precision than everything else; then it alone is rounded."""
    F, dtype = 6, torch.promote_types(kept, torch.float32)
    h_AH, grad_AF = torch.randn(23, 2 * F if kind == "swiglu" else F).to(kept), torch.randn(23, F, dtype=dtype)
    exact = h_AH.double().clone().requires_grad_()
    expected = activate(exact, kind)
    (gradient,) = torch.autograd.grad(expected, exact, grad_AF.double())
    out_AF, dh_AH, none = backward(h_AH, None, grad_AF, kind)
    assert out_AF.dtype == dh_AH.dtype == dtype and len(none) == 0
    assert torch.equal(weighted_activation(h_AH, None, kind, dtype), out_AF)
    torch.testing.assert_close(out_AF.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dh_AH.double(), gradient, rtol=1e-5, atol=1e-6)
    torch.library.opcheck(weighted_activation, (h_AH, None, kind, dtype))
    torch.library.opcheck(weighted_activation_backward_, (h_AH, None, grad_AF, kind))


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_no_rows_are_no_rows(kind):
    h_AH = torch.empty(0, 8)
    assert weighted_activation(h_AH, torch.empty(0), kind, h_AH.dtype).shape == (0, 4 if kind == "swiglu" else 8)
    grad = torch.empty(0, 4 if kind == "swiglu" else 8)
    assert [x.shape[0] for x in backward(h_AH, torch.empty(0), grad, kind)] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_operators_keep_their_promises(kind):
    h_AH, weight_A, grad = torch.randn(5, 8), torch.rand(5), torch.randn(5, 4 if kind == "swiglu" else 8)
    torch.library.opcheck(weighted_activation, (h_AH, weight_A, kind, torch.float32))
    torch.library.opcheck(weighted_activation_backward_, (h_AH, weight_A, grad, kind))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_gelu_by_a_sigmoid_is_gelu_by_a_tanh(dtype, tolerance):
    """Value and derivative, also where one of the two is all but zero, and for numbers whose cube is not finite."""
    h = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-1e4, 1e4, -1e13, 1e13, 0.0]))).to(dtype)
    h.requires_grad_()
    expected = torch.nn.functional.gelu(h, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), h)
    with torch.no_grad():
        for found in (gelu(h), gelu_and_slope(h)[0]):
            torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gelu_and_slope(h)[1], slope, rtol=tolerance, atol=2 * tolerance)
