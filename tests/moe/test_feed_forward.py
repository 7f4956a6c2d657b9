"""A feed-forward network as one differentiable step, against autograd on the plain formula."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_moe.benchmarks.measure import saved_bytes
from diffusion_moe.moe.activation import activated
from diffusion_moe.moe.feed_forward import CastingLinear, FeedForwardFunction, feed_forward
from diffusion_moe.moe.precision import use_cpu_matmul

KINDS = list(itertools.product(["gelu", "silu", "swiglu"], [True, False]))
"""Activations, with and without biases."""


def make_layers(kind, bias, dim=6, hidden=10, out=7):
    """The first projection's layers, the last one."""
    return [nn.Linear(dim, hidden, bias) for _ in range(2 if kind == "swiglu" else 1)], nn.Linear(hidden, out, bias)


def plain(x, first, last, kind):
    return last(activated(kind, *(linear(x) for linear in first)))


def results(function, x, layers):
    """The answer, and the gradients of x and all parameters for a fixed direction."""
    y = function()
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    parameters = [p for layer in layers for p in layer.parameters()]
    return [y, *torch.autograd.grad(y.float(), (x, *parameters), direction)]


@pytest.mark.parametrize(("kind", "bias"), KINDS)
@pytest.mark.parametrize("shape", [(2, 5, 6), (9, 6), (0, 6)], ids=str)
def test_equals_the_formula_in_float32(kind, bias, shape):
    first, last = make_layers(kind, bias)
    x = torch.randn(shape, requires_grad=True)
    functions = (lambda: feed_forward(x, first, last, kind)), (lambda: plain(x, first, last, kind))
    for actual, expected in zip(*(results(function, x, (*first, last)) for function in functions)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "bias"), KINDS)
def test_is_within_bfloat16_under_autocast_in_either_dtype_of_matmuls(kind, bias, cpu_matmul):
    first, last = make_layers(kind, bias, 32, 48, 16)
    x = torch.randn(3, 7, 32, requires_grad=True)
    exact = results(lambda: plain(x, first, last, kind), x, (*first, last))
    with torch.autocast("cpu", torch.bfloat16):
        asked = results(lambda: feed_forward(x, first, last, kind), x, (*first, last))
        usual = results(lambda: plain(x, first, last, kind), x, (*first, last))
    for actual, other, expected in zip(asked, usual, exact):
        assert actual.dtype == other.dtype
        error = float(((actual.float() - expected).norm() / expected.norm()).detach())
        assert error < 1e-2
        assert error > 1e-4 or cpu_matmul == "float32"


@pytest.mark.parametrize("kind", ["gelu", "silu", "swiglu"])
def test_float32_matmuls_round_what_is_kept_and_returned_and_nothing_else(kind):
    """Against float32 whose first projection and answer are rounded to bfloat16: to float32's accuracy."""
    first, last = make_layers(kind, True, 16, 24, 8)
    x = torch.randn(5, 16, requires_grad=True)

    def rounded(h):
        return h + (h.bfloat16().float() - h).detach()

    def asked():
        with torch.autocast("cpu", torch.bfloat16), use_cpu_matmul("float32"):
            y = feed_forward(x, first, last, kind)
        assert y.dtype == torch.bfloat16
        return y.float()

    def expected():
        return rounded(last(activated(kind, *(rounded(linear(x)) for linear in first))))

    answer, *gradients = results(asked, x, (*first, last))
    exact_answer, *exact_gradients = results(expected, x, (*first, last))
    torch.testing.assert_close(answer, exact_answer, rtol=2.0**-7, atol=1e-6)  # a rounding that falls the other way
    for actual, exact in zip(gradients, exact_gradients):
        # The direction is rounded on its way through the answer's dtype.
        assert (actual - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("choice", ["low_precision", "float32"])
def test_a_weights_last_bits_count_in_float32(choice):
    """(1 + 2^-10) - 1, of which bfloat16 sees 1 - 1, in the first layer and in the last."""
    fine, one = torch.tensor([[1 + 2.0**-10, -1.0]]), torch.tensor([[1.0]])
    for up, down, width in ((fine, one, 1), (torch.eye(2), fine, 2)):
        first, last = nn.Linear(2, width, bias=False), nn.Linear(width, 1, bias=False)
        with torch.no_grad():
            first.weight.copy_(up)
            last.weight.copy_(down)
        x = torch.full((1, 2), 2.0**16, dtype=torch.bfloat16)  # whose SiLU is itself; 64 times the sum's too
        with torch.autocast("cpu", torch.bfloat16), use_cpu_matmul(choice):
            y = feed_forward(x, [first], last, "silu")
        assert float(y) == (64 if choice == "float32" else 0)


@pytest.mark.parametrize(("kind", "bias"), KINDS)
def test_gradcheck_in_float64(kind, bias):
    first, last = make_layers(kind, bias, 4, 6, 3)
    parameters = [p for layer in (*first, last) for p in (layer.weight, layer.bias)]
    parameters = [None if p is None else p.detach().double().requires_grad_() for p in parameters]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    given = [p for p in parameters if p is not None]

    def of(x, *given):
        rest = iter(given)
        return FeedForwardFunction.apply(x, kind, torch.float64, *(p if p is None else next(rest) for p in parameters))

    assert torch.autograd.gradcheck(of, (x, *given))


@pytest.mark.parametrize("kind", ["gelu", "silu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_input_and_the_first_projection_are_kept(kind, dtype, cpu_matmul):
    first, last = make_layers(kind, True)
    x = torch.randn(2, 5, 6).to(dtype).requires_grad_()
    parameters = tuple(p for layer in (*first, last) for p in layer.parameters())

    def forward(function):
        def run():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return function(x, first, last, kind)

        return run

    kept = x.nbytes + 10 * 10 * len(first) * dtype.itemsize
    assert saved_bytes(forward(feed_forward), parameters) == kept
    assert saved_bytes(forward(plain), parameters) > kept


def test_an_input_without_a_gradient_gets_none():
    """A capacity predictor's, which is detached: no matmul is run for it."""
    first, last = make_layers("silu", True)
    x = torch.randn(9, 6)
    y = feed_forward(x, first, last, "silu")
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert counted.get_total_flops() == 2 * 9 * (6 * 10 + 2 * 10 * 7)
    assert x.grad is None and all(p.grad is not None for layer in (*first, last) for p in layer.parameters())


@pytest.mark.parametrize("frozen", ["first", "last", "all"])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_frozen_layers_cost_no_matmuls_and_get_no_gradient(kind, frozen):
    first, last = make_layers(kind, True)
    x = torch.randn(9, 6, requires_grad=True)
    expected = torch.autograd.grad(plain(x, first, last, kind).sum(), (x, *last.parameters(), *first[0].parameters()))
    for layer in (*(first if frozen != "last" else ()), *([last] if frozen != "first" else ())):
        layer.requires_grad_(False)
    y = feed_forward(x, first, last, kind)
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    given = [x.grad, *(p.grad for layer in (last, first[0]) for p in layer.parameters())]
    kept = [True, *[frozen == "first"] * 2, *[frozen == "last"] * 2]
    for gradient, exact, is_kept in zip(given, expected, kept):
        assert (gradient is not None) == is_kept
        if is_kept:
            torch.testing.assert_close(gradient, exact)
    one, other = 2 * 9 * 10 * 6 * len(first), 2 * 9 * 10 * 7
    assert counted.get_total_flops() == one + other + one * (frozen == "last") + other * (frozen == "first")


def test_wide_layers_compute_in_the_inputs_dtype():
    first, last = [CastingLinear(6, 10)], CastingLinear(10, 7)
    exact = feed_forward(torch.ones(2, 6), first, last, "silu")
    for layer in (*first, last):
        layer.bfloat16()
    x = torch.ones(2, 6, requires_grad=True)
    y = feed_forward(x, first, last, "silu")
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32 and last.weight.grad.dtype == torch.bfloat16
    assert 0 < (y - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("how", ["hook", "replaced forward", "subclass"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_where_a_layer_is_not_the_plain_one_all_are_called(how, which):
    first, last = make_layers("swiglu", True)
    layers, called = [*first, last], []
    if how == "hook":
        layers[which].register_forward_pre_hook(lambda module, args: called.append(1))
    elif how == "replaced forward":
        forward = layers[which].forward
        layers[which].forward = lambda x: called.append(1) or forward(x)
    else:

        class Adapted(nn.Linear):
            def forward(self, x):
                called.append(1)
                return super().forward(x)

        adapted = Adapted(layers[which].in_features, layers[which].out_features)
        adapted.load_state_dict(layers[which].state_dict())
        layers[which] = adapted
    x = torch.randn(2, 6)
    expected = plain(x, layers[:2], layers[2], "swiglu")
    called.clear()
    assert torch.equal(feed_forward(x, layers[:2], layers[2], "swiglu"), expected) and called == [1]
