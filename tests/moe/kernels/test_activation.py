"""The activation's kernels: forward, and backward with the router's gradient."""

import pytest
import torch

from diffusion_moe.moe import backend
from diffusion_moe.moe.activation import weighted_activation, weighted_activation_backward_

KINDS = ["swiglu", "gelu"]


def backward(h_AH, weight_A, grad_AF, kind):
    """The weighted activation and both gradients; the gradient given is left alone."""
    out_AF = grad_AF.clone(memory_format=torch.contiguous_format)
    return out_AF, *weighted_activation_backward_(h_AH, weight_A, out_AF, kind)


def inputs(kind, rows, width, dtype=torch.float32):
    h_AH = torch.randn(rows, 2 * width if kind == "swiglu" else width).to(dtype)
    return h_AH, torch.rand(rows), torch.randn(rows, width).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (23, 6), (300, 8), (5, 1100)], ids=["one", "odd", "blocks of rows", "blocks of columns"]
)
def test_equals_torch(both, kind, rows, width):
    h_AH, weight_A, grad_AF = inputs(kind, rows, width)
    kernel, oracle = both(lambda: weighted_activation(h_AH, weight_A, kind, h_AH.dtype))
    torch.testing.assert_close(kernel, oracle, rtol=1e-5, atol=1e-6)
    kernel, oracle = both(lambda: backward(h_AH, weight_A, grad_AF, kind))
    torch.testing.assert_close(kernel[:2], oracle[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kernel[2], oracle[2], rtol=1e-5, atol=1e-4)  # a sum of up to 1100 products


@pytest.mark.parametrize("kind", ["gelu", "silu", "swiglu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (23, 6), (5, 1100)], ids=["one", "odd", "blocks of columns"])
def test_equals_torch_without_weights(both, kind, rows, width):
    h_AH, _, grad_AF = inputs(kind, rows, width)
    kernel, oracle = both(lambda: weighted_activation(h_AH, None, kind, torch.float32))
    torch.testing.assert_close(kernel, oracle, rtol=1e-5, atol=1e-6)
    kernel, oracle = both(lambda: backward(h_AH, None, grad_AF, kind))
    torch.testing.assert_close(kernel, oracle, rtol=1e-5, atol=1e-6)
    assert len(kernel[2]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_the_results_and_nothing_before(both, kind, dtype):
    """By one unit in the last place at most: the interpreter truncates to bfloat16 where a device rounds."""
    h_AH, weight_A, grad_AF = inputs(kind, 23, 6, dtype)
    unit = torch.finfo(dtype).eps
    exact = (h_AH.float(), weight_A, grad_AF.float())
    with backend.use("triton"):
        out_AF, dh_AH, dweight_A = backward(h_AH, weight_A, grad_AF, kind)
    with backend.use("torch"):
        expected = backward(*exact, kind)
    assert out_AF.dtype == dh_AH.dtype == dtype and dweight_A.dtype == torch.float32
    torch.testing.assert_close(out_AF.float(), expected[0], rtol=unit, atol=1e-7)
    torch.testing.assert_close(dh_AH.float(), expected[1], rtol=unit, atol=1e-6)
    torch.testing.assert_close(dweight_A, expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms(kind):
    """At 0 both activations are 0; their slope is 1/2. Far out gelu and silu are 0 and the identity."""
    far = torch.tensor([[0.0], [30.0], [-30.0], [100.0], [-100.0]])
    h_AH = far if kind == "gelu" else torch.cat((far, torch.full_like(far, 2.0)), dim=1)
    weight_A, grad_AF = torch.full((5,), 3.0), torch.full((5, 1), 7.0)
    with backend.use("triton"):
        out_AF, dh_AH, dweight_A = backward(h_AH, weight_A, grad_AF, kind)
    times = 1.0 if kind == "gelu" else 2.0
    torch.testing.assert_close(out_AF[:, 0], 3 * times * torch.tensor([0.0, 30, 0, 100, 0]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(dweight_A, 7 * times * torch.tensor([0.0, 30, 0, 100, 0]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(dh_AH[:, 0], 21 * times * torch.tensor([0.5, 1, 0, 1, 0]), rtol=1e-6, atol=1e-9)
    if kind == "swiglu":
        torch.testing.assert_close(dh_AH[:, 1], 21 * torch.tensor([0.0, 30, 0, 100, 0]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_any_layout_and_no_rows(both, kind):
    h_AH, weight_A, grad_AF = inputs(kind, 5, 3)
    strided = (h_AH.T.contiguous().T, weight_A[:1].expand(5), grad_AF[:, :1].expand(5, 3))
    kernel, oracle = both(lambda: backward(*strided, kind))
    torch.testing.assert_close(kernel, oracle, rtol=1e-5, atol=1e-6)
    with backend.use("triton"):
        nothing = backward(h_AH[:0], weight_A[:0], grad_AF[:0], kind)
        assert [x.shape for x in nothing] == [(0, 3), (0, h_AH.shape[1]), (0,)]
        assert weighted_activation(h_AH[:0], weight_A[:0], kind, h_AH.dtype).shape == (0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_operators_keep_their_promises(kind):
    h_AH, weight_A, grad_AF = inputs(kind, 5, 4)
    with backend.use("triton"):
        torch.library.opcheck(weighted_activation, (h_AH, weight_A, kind, torch.float32))
        torch.library.opcheck(weighted_activation_backward_, (h_AH, weight_A, grad_AF, kind))
