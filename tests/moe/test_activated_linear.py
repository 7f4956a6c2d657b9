"""A linear layer on an activation that is not kept, against autograd on the plain formula."""

import pytest
import torch
from torch import nn

from diffusion_moe.benchmarks.measure import saved_bytes
from diffusion_moe.moe.activated_linear import _ActivatedLinear, activated_linear
from diffusion_moe.moe.activation import activated

KINDS = ["gelu", "silu", "swiglu"]


def make_inputs(kind, dtype=torch.float32):
    return [torch.randn(2, 5, 6, dtype=dtype, requires_grad=True) for _ in range(2 if kind == "swiglu" else 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_output_and_gradients_are_those_of_the_formula(kind, bias, autocast):
    linear = nn.Linear(6, 7, bias=bias)
    inputs = make_inputs(kind)
    results = []
    for function in (lambda: activated_linear(linear, kind, *inputs), lambda: linear(activated(kind, *inputs))):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function()
        grads = torch.autograd.grad(y.float().square().sum(), (*inputs, *linear.parameters()))
        results.append((y, *grads))
    for actual, expected in zip(*results):
        assert actual.dtype == expected.dtype
        bound = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(actual, expected, **bound)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(kind):
    linear = nn.Linear(6, 3).double()
    inputs = make_inputs(kind, torch.float64)

    def of(weight, bias, *inputs):
        return _ActivatedLinear.apply(weight, bias, kind, torch.float64, *inputs)

    assert torch.autograd.gradcheck(of, (linear.weight, linear.bias, *inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_inputs_are_kept(kind):
    linear, inputs = nn.Linear(6, 7), make_inputs(kind)
    parameters = tuple(linear.parameters())
    assert saved_bytes(lambda: activated_linear(linear, kind, *inputs), parameters) == sum(x.nbytes for x in inputs)
    assert saved_bytes(lambda: linear(activated(kind, *inputs)), parameters) > sum(x.nbytes for x in inputs)


@pytest.mark.parametrize("how", ["hook", "replaced forward", "subclass"])
def test_a_layer_that_is_not_the_plain_one_is_called(how):
    linear, called = nn.Linear(6, 7), []
    if how == "hook":
        linear.register_forward_pre_hook(lambda module, args: called.append(1))
    elif how == "replaced forward":
        plain = linear.forward
        linear.forward = lambda x: called.append(1) or plain(x)
    else:

        class Adapted(nn.Linear):
            def forward(self, x):
                called.append(1)
                return super().forward(x)

        linear = Adapted(6, 7)
    activated_linear(linear, "gelu", *make_inputs("gelu"))
    assert called
