"""The grouped experts against the loop over experts: output and every gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion_moe.benchmarks.measure import saved_bytes
from diffusion_moe.moe import (
    GroupedExperts,
    expert_matmul,
    experts_loop,
    route_by_expert,
    route_by_mask,
    route_by_token,
)
from diffusion_moe.moe.activation import activate
from diffusion_moe.moe.precision import VARIABLE

KINDS = list(itertools.product(["swiglu", "gelu"], [True, False]))


@pytest.fixture(autouse=True)
def _low_precision(monkeypatch):
    """Matmuls in bfloat16 stay so, whatever is faster on this processor, unless a test asks for both."""
    monkeypatch.setenv(VARIABLE, "low_precision")


def make_experts(dim, expert_dim, num_experts, activation="swiglu", bias=True) -> GroupedExperts:
    experts = GroupedExperts(dim, expert_dim, num_experts, activation, bias)
    if bias:
        for b in (experts.b_in, experts.b_out):
            torch.nn.init.normal_(b)
    return experts


def outputs_and_gradients(function, experts, x_TD, routing, weight):
    """Output, then the gradients of x, routing weights and all parameters for a random direction."""
    y_TD = function(x_TD, routing)
    direction = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(3))
    inputs = (x_TD, weight, *experts.parameters())
    # materialize_grads: a parameter the loop never touched has gradient zero.
    return [y_TD, *torch.autograd.grad(y_TD.float(), inputs, direction, retain_graph=True, materialize_grads=True)]


def assert_equals_loop(experts, x_TD, routing, weight):
    fast = outputs_and_gradients(experts, experts, x_TD, routing, weight)
    slow = outputs_and_gradients(lambda x, r: experts_loop(experts, x, r), experts, x_TD, routing, weight)
    assert len(fast) == 3 + len(list(experts.parameters()))
    for actual, expected in zip(fast, slow):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def route(expert_TK, num_experts):
    """Random weights for given choices, and the leaf that holds them."""
    weight_TK = torch.rand(expert_TK.shape, requires_grad=True)
    return route_by_token(expert_TK, weight_TK, num_experts), weight_TK


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_equals_the_loop(activation, bias):
    experts = make_experts(8, 12, 5, activation, bias)
    routing, weight = route(torch.rand(23, 5).argsort(1)[:, :2], 5)  # 23 tokens do not divide by 5 experts
    assert_equals_loop(experts, torch.randn(23, 8, requires_grad=True), routing, weight)


@pytest.mark.parametrize(("activation", "bias"), KINDS)
@pytest.mark.parametrize("chosen", [[2, 4], [1]], ids=["some experts idle", "one expert has all"])
def test_equals_the_loop_with_idle_experts(activation, bias, chosen):
    experts = make_experts(8, 12, 5, activation, bias)
    routing, weight = route(torch.tensor(chosen).expand(9, -1), 5)
    assert [e for e, n in enumerate(routing.report.counts_E.tolist()) if n] == chosen
    x_TD = torch.randn(9, 8, requires_grad=True)
    assert_equals_loop(experts, x_TD, routing, weight)
    experts(x_TD, routing).sum().backward()
    idle = [e for e in range(5) if e not in chosen]
    assert all(
        torch.all(p.grad[idle] == 0) and torch.all(p.grad[chosen].flatten(1).any(1)) for p in experts.parameters()
    )


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_a_token_without_experts_gets_exactly_zero(activation, bias):
    experts = make_experts(8, 12, 3, activation, bias)
    chosen_TE = torch.rand(10, 3) < 0.4
    chosen_TE[4], chosen_TE[0] = False, True
    weight_TE = torch.rand(10, 3, requires_grad=True)
    routing, x_TD = route_by_mask(chosen_TE, weight_TE), torch.randn(10, 8, requires_grad=True)
    y_TD = experts(x_TD, routing)
    assert torch.all(y_TD[4] == 0) and torch.all(y_TD[0] != 0)
    assert_equals_loop(experts, x_TD, routing, weight_TE)
    nothing = route_by_mask(torch.zeros_like(chosen_TE), weight_TE)
    assert torch.equal(experts(x_TD, nothing), torch.zeros(10, 8))


def test_one_assignment_is_the_plain_formula():
    """SwiGLU takes gates first, then values; GELU is the tanh form; the weight multiplies the whole output."""
    x = torch.randn(1, 4)
    for activation in ("swiglu", "gelu"):
        experts = make_experts(4, 6, 2, activation)
        routing = route_by_token(torch.tensor([[1]]), torch.tensor([[0.3]]), 2)
        h = x @ experts.w_in[1] + experts.b_in[1]
        hidden = F.silu(h[:, :6]) * h[:, 6:] if activation == "swiglu" else F.gelu(h, approximate="tanh")
        expected = 0.3 * (hidden @ experts.w_out[1] + experts.b_out[1])
        torch.testing.assert_close(experts(x, routing), expected)
        torch.testing.assert_close(activate(h, activation), hidden)


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_autocast_stays_within_bfloat16_of_float32(activation, bias, cpu_matmul):
    experts = make_experts(32, 32, 4, activation, bias)
    routing, weight = route(torch.rand(64, 4).argsort(1)[:, :2], 4)
    x_TD = torch.randn(64, 32, requires_grad=True)
    expected = outputs_and_gradients(lambda x, r: experts_loop(experts, x, r), experts, x_TD, routing, weight)
    with torch.autocast("cpu", torch.bfloat16):
        actual = outputs_and_gradients(experts, experts, x_TD, routing, weight)
    assert actual[0].dtype == torch.float32
    for a, e in zip(actual, expected):
        error = float(((a - e).norm() / e.norm()).detach())
        assert error < 4 * 2.0**-8, f"relative error {error}: bfloat16 rounds to 2^-8, four roundings on the way"
        assert error > 1e-4 or cpu_matmul == "float32"


def test_the_sum_over_experts_runs_in_float32_under_autocast(cpu_matmul):
    """1 + 2^-8 + 2^-8 is lost when partial sums are rounded to bfloat16, in the output and in the input's gradient."""
    experts = make_experts(8, 8, 3, "gelu", bias=False)
    parts = torch.tensor([1.0, 2.0**-8, 2.0**-8])[:, None, None]
    with torch.no_grad():  # the hidden layer is gelu(8) = 8 in its first column, whose slope is 1
        experts.w_in.copy_(torch.zeros(8, 8).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(8.0)))
        experts.w_out.copy_(parts * torch.ones(8, 8) / 8)
    x = torch.zeros(1, 8).index_fill(1, torch.tensor(0), 1.0).requires_grad_()
    routing = route_by_token(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, routing)
    assert torch.all(y == 1 + 2.0**-7)
    (grad,) = torch.autograd.grad(y[0, 0], x)
    assert grad[0, 0] == 1 + 2.0**-7


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_equals_the_loop_for_any_sizes(data):
    tokens, experts, dim, width = (data.draw(st.integers(1, high)) for high in (17, 6, 9, 9))
    top_k = data.draw(st.integers(1, experts))
    activation, bias = data.draw(st.sampled_from(KINDS))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    routing, weight = route(torch.rand(tokens, experts).argsort(1)[:, :top_k], experts)
    layer = make_experts(dim, width, experts, activation, bias)
    assert_equals_loop(layer, torch.randn(tokens, dim, requires_grad=True), routing, weight)


def test_experts_are_initialised_one_by_one():
    """Xavier's bound is that of one expert's matrix, not of the stack; gate and value are drawn separately."""
    experts = GroupedExperts(64, 48, 8, "swiglu", bias=True)
    bound = (6 / (64 + 48)) ** 0.5
    for w in (*experts.w_in, *experts.w_out):
        assert 0.95 * bound < float(w.abs().max()) <= bound
        assert float(w.var()) == pytest.approx(bound**2 / 3, rel=0.1)
    assert torch.all(experts.b_in == 0) and torch.all(experts.b_out == 0)
    assert not torch.equal(experts.w_in[0], experts.w_in[1])


def test_gradcheck_in_float64():
    """Every input's gradient against finite differences, with both kinds of grouping."""
    for activation, bias in KINDS:
        experts = make_experts(4, 6, 3, activation, bias).double()
        x_TD = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
        weight_TK = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
        weight_EC = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
        expert_TK, token_EC = torch.rand(7, 3).argsort(1)[:, :2], torch.rand(3, 7).argsort(1)[:, :4]
        names = [name for name, _ in experts.named_parameters()]

        def of(x, weight, *parameters, route=None, experts=experts, names=names):
            return torch.func.functional_call(experts, dict(zip(names, parameters)), (x, route(weight)))

        for weight, route in (
            (weight_TK, lambda w, chosen=expert_TK: route_by_token(chosen, w, 3)),
            (weight_EC, lambda w, chosen=token_EC: route_by_expert(chosen, w)),
        ):
            inputs = (x_TD, weight, *experts.parameters())
            assert torch.autograd.gradcheck(lambda *args, route=route: of(*args, route=route), inputs)


@pytest.mark.parametrize(("activation", "bias"), KINDS)
@pytest.mark.parametrize("keep", [0, 10**9])
def test_bfloat16_is_close_to_float32_whether_casts_are_kept_or_recomputed(
    activation, bias, keep, monkeypatch, cpu_matmul
):
    monkeypatch.setattr("diffusion_moe.moe.expert_autograd.KEEP_CAST_BELOW", keep)
    experts = make_experts(32, 48, 4, activation, bias)
    routing, weight = route(torch.rand(64, 4).argsort(1)[:, :2], 4)
    x_TD = torch.randn(64, 32, requires_grad=True)
    exact = outputs_and_gradients(experts, experts, x_TD, routing, weight)

    def rounded(x, r):
        with torch.autocast("cpu", torch.bfloat16):
            return experts(x, r)

    for actual, expected in zip(outputs_and_gradients(rounded, experts, x_TD, routing, weight), exact):
        assert actual.dtype == expected.dtype
        assert (actual - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("frozen", [["w_in", "b_in"], ["w_out", "b_out"], ["w_in", "w_out", "b_in", "b_out"]], ids=str)
def test_frozen_experts_cost_no_matmuls_and_get_no_gradient(frozen):
    T, D, width, E = 23, 8, 12, 5
    experts = make_experts(D, width, E, "gelu")
    routing, weight = route(torch.rand(T, E).argsort(1)[:, :2], E)
    x_TD, direction = torch.randn(T, D, requires_grad=True), torch.randn(T, D)

    def backward():
        """Gradients by name, and operations."""
        inputs = {"x": x_TD, "weight": weight, **dict(experts.named_parameters())}
        y_TD = experts(x_TD, routing)
        for value in inputs.values():
            value.grad = None
        with FlopCounterMode(display=False) as counted:
            y_TD.backward(direction, retain_graph=True)
        return {name: value.grad for name, value in inputs.items()}, counted.get_total_flops()

    before, operations = backward()
    for name in frozen:
        getattr(experts, name).requires_grad_(False)
    after, fewer = backward()
    assert [name for name, gradient in after.items() if gradient is None] == [n for n in after if n in frozen]
    assert all(gradient is None or torch.equal(gradient, before[name]) for name, gradient in after.items())
    rows = 2 * T
    sums = 2 * rows * expert_matmul.ONES * width
    costs = {"w_in": 2 * rows * D * width, "w_out": 2 * rows * D * width, "b_in": sums, "b_out": 2 * T * E * D}
    assert operations - fewer == sum(costs[name] for name in frozen)


def kept_bytes(experts, x_TD, routing):
    """Bytes that autograd keeps, without parameters, each storage once."""
    return saved_bytes(lambda: experts(x_TD, routing), tuple(experts.parameters()))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_only_input_first_projection_and_routing_are_kept(activation):
    T, D, F, E, K = 64, 8, 16, 4, 2
    experts = make_experts(D, F, E, activation, bias=False)
    routing, _ = route(torch.rand(T, E).argsort(1)[:, :K], E)
    A, H = T * K, F * (2 if activation == "swiglu" else 1)
    x_TD = torch.randn(T, D, requires_grad=True)
    numbers = 4 * (T * D + A * H)
    indices = 8 * A + 4 * E + 8 * A + 8 * T  # token_A, offsets_E, row_A, start_T
    assert kept_bytes(experts, x_TD, routing) - routing.weight_A.nbytes - numbers - indices <= 8 * A


@pytest.mark.parametrize(("activation", "bias"), KINDS)
@pytest.mark.parametrize("pool", [True, False])
def test_recomputing_the_first_projection_changes_nothing_and_keeps_less(activation, bias, pool):
    T, D, F_, E, K = 64, 8, 16, 4, 2
    experts = make_experts(D, F_, E, activation, bias)
    weight = torch.rand((E, 5) if pool else (T, K), requires_grad=True)
    if pool:
        routing = route_by_expert(torch.rand(E, T).argsort(1)[:, :5], weight)
    else:
        routing = route_by_token(torch.rand(T, E).argsort(1)[:, :K], weight, E)
    x_TD = torch.randn(T, D, requires_grad=True)
    before, kept = outputs_and_gradients(experts, experts, x_TD, routing, weight), kept_bytes(experts, x_TD, routing)
    experts.recompute = True
    assert all(map(torch.equal, outputs_and_gradients(experts, experts, x_TD, routing, weight), before))
    first_projection = 4 * len(routing.token_A) * experts.w_in.shape[2]
    assert kept_bytes(experts, x_TD, routing) == kept - first_projection


@pytest.mark.parametrize("pool", [True, False])
def test_gradients_cast_block_by_block_are_those_cast_at_once(pool, monkeypatch, cpu_matmul):
    experts = make_experts(16, 24, 5, "swiglu", bias=False)
    weight = torch.rand((5, 6) if pool else (30, 2), requires_grad=True)
    if pool:
        routing = route_by_expert(torch.rand(5, 30).argsort(1)[:, :6], weight)
    else:
        routing = route_by_token(torch.tensor([[0, 3]]).expand(30, 2), weight, 5)  # experts 1, 2 and 4 are idle

    def gradients(block):
        monkeypatch.setattr("diffusion_moe.moe.expert_matmul.CAST_BLOCK", block)
        with torch.autocast("cpu", torch.bfloat16):
            out = experts(torch.linspace(-1, 1, 30 * 16).view(30, 16), routing)
        return torch.autograd.grad(out.float().square().sum(), (experts.w_in, experts.w_out), retain_graph=True)

    whole = gradients(10**9)
    assert whole[0].dtype == torch.float32 and whole[0].abs().sum() > 0
    for block in (1, 2 * 16 * 48):
        assert all(map(torch.equal, gradients(block), whole))


class DropEveryThird(torch.nn.Dropout):
    """Dropout with a mask that is known."""

    def forward(self, hidden):
        return hidden * (torch.arange(hidden.numel()).view(hidden.shape) % 3 > 0).to(hidden.dtype) * 1.5


def dropout_loop(experts, x_TD, routing):
    """`experts_loop` with `DropEveryThird`."""
    out_TD = torch.zeros_like(x_TD)
    for row, (token, expert) in enumerate(zip(routing.token_A.tolist(), routing.expert_A().tolist())):
        h_H = x_TD[token] @ experts.w_in[expert] + (0 if experts.b_in is None else experts.b_in[expert])
        a_F = activate(h_H[None], experts.activation)[0]
        index_F = torch.arange(row * len(a_F), (row + 1) * len(a_F))
        y_D = (a_F * (index_F % 3 > 0) * 1.5) @ experts.w_out[expert]
        y_D = y_D + (0 if experts.b_out is None else experts.b_out[expert])
        out_TD = out_TD.index_add(0, torch.tensor([token]), (routing.weight_A[row] * y_D)[None])
    return out_TD


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_dropout_has_the_gradients_of_the_loop(activation, bias):
    """Of the input, the routing weights and all parameters, with an idle expert."""
    experts = make_experts(5, 4, 4, activation, bias).double().train()
    experts.dropout = DropEveryThird(1 / 3)
    x_TD = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    routing = route_by_token(torch.tensor([[0, 1], [1, 3], [3, 0]] * 2 + [[1, 0]]), weight_TK, 4)
    direction_TD = torch.randn(7, 5, dtype=torch.float64)
    inputs = (x_TD, weight_TK, *experts.parameters())
    results = []
    for function in (experts, lambda x, r: dropout_loop(experts, x, r)):
        y_TD = function(x_TD, routing)
        results.append((y_TD, *torch.autograd.grad(y_TD, inputs, direction_TD, retain_graph=True)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


class Made(TorchDispatchMode):
    """Names of operators, and shapes of the float32 tensors that they made."""

    def __init__(self):
        super().__init__()
        self.called, self.float32 = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.called.add(func.__name__.split(".")[0])
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.float32 |= {tuple(x.shape) for x in tensors if x.dtype == torch.float32}
        return out


ATOMIC = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put_", "embedding_dense_backward"}


def test_dropout_adds_nothing_by_atomics_and_keeps_to_low_precision():
    """On CUDA these operators add in any order; a gather's own gradient is an index_add. Rows: 12 of width 24."""
    experts = make_experts(24, 4, 3).train()
    experts.dropout.p = 0.25
    x_TD, weight_TK = torch.randn(6, 24, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    routing = route_by_token(torch.tensor([[0, 1], [1, 2], [2, 0]] * 2), weight_TK, 3)
    with torch.autocast("cpu", torch.bfloat16), Made() as made:
        y_TD = experts(x_TD, routing)
        torch.autograd.grad(y_TD, (x_TD, weight_TK, *experts.parameters()), torch.ones_like(y_TD))
    assert not made.called & ATOMIC and {"combine", "gmm", "gmm_wgrad"} <= made.called
    assert not made.float32 & {(12, 24), (12, 4), (12, 8)}
