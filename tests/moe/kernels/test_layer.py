"""The whole layer with every kernel on: outputs and all gradients against the loop over experts and against torch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_context import with_context

from diffusion_moe.moe import (
    GroupedExperts,
    MoEFeedForward,
    RouterConfig,
    backend,
    experts_loop,
    route_by_expert,
    route_by_mask,
    route_by_token,
)
from diffusion_moe.routing_rules import RULES

KINDS = list(itertools.product(["swiglu", "gelu"], [True, False]))


def make_experts(dim, width, num_experts, activation, bias):
    experts = GroupedExperts(dim, width, num_experts, activation, bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


def route(kind, weight_TE, per_token=2):
    """A routing of that kind whose weights come from weight_TE."""
    num_tokens, num_experts = weight_TE.shape
    if kind == "by token":
        expert_TK = torch.rand(num_tokens, num_experts).argsort(1)[:, :per_token]
        return route_by_token(expert_TK, weight_TE.gather(1, expert_TK), num_experts)
    if kind == "by expert":
        token_EC = torch.rand(num_experts, num_tokens).argsort(1)[:, : max(1, num_tokens // 2)]
        return route_by_expert(token_EC, weight_TE.T.gather(1, token_EC))
    return route_by_mask(torch.rand(num_tokens, num_experts) < 0.4, weight_TE)


def outputs_and_gradients(function, experts, x_TD, routing, weight_TE):
    y_TD = function(x_TD, routing)
    direction = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(3))
    inputs = (x_TD, weight_TE, *experts.parameters())
    return [y_TD, *torch.autograd.grad(y_TD, inputs, direction, retain_graph=True, materialize_grads=True)]


def assert_equals_loop(kind, tokens, num_experts, dim, width, activation, bias):
    experts = make_experts(dim, width, num_experts, activation, bias)
    x_TD = torch.randn(tokens, dim, requires_grad=True)
    weight_TE = torch.rand(tokens, num_experts, requires_grad=True)
    with backend.use("triton"):
        routing = route(kind, weight_TE, min(2, num_experts))
        fast = outputs_and_gradients(experts, experts, x_TD, routing, weight_TE)
    slow = outputs_and_gradients(lambda x, r: experts_loop(experts, x, r), experts, x_TD, routing, weight_TE)
    assert len(fast) == 3 + len(list(experts.parameters()))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("activation", "bias"), KINDS)
@pytest.mark.parametrize("kind", ["by token", "by expert", "by mask"])
def test_experts_equal_the_loop(kind, activation, bias):
    assert_equals_loop(kind, 23, 5, 8, 12, activation, bias)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_experts_equal_the_loop_for_any_sizes(data):
    tokens, experts, dim, width = (data.draw(st.integers(1, high)) for high in (17, 6, 9, 9))
    kind = data.draw(st.sampled_from(["by token", "by expert", "by mask"]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    assert_equals_loop(kind, tokens, experts, dim, width, *data.draw(st.sampled_from(KINDS)))


@pytest.mark.parametrize("router", RULES)
@pytest.mark.parametrize("balance", ["none", "aux", "bias"])
def test_a_training_step_of_the_layer_equals_torch(both, router, balance):
    settings = {"top_k": 2, "n_group": 2, "topk_group": 1} if router == "dsmoe" else {"top_k": 2}
    config = RouterConfig(router, num_experts=8, capacity=2.0, balance=balance, **settings)
    layer = with_context(MoEFeedForward(6, 10, config, bias=True, shared="swiglu"))
    x_BND = torch.randn(2, 9, 6, requires_grad=True)

    def run():
        out = layer(x_BND)
        loss = out.hidden_states.square().sum() + sum(out.report.losses.values())
        grads = torch.autograd.grad(loss, (x_BND, *layer.parameters()))
        return out.hidden_states, out.report.counts_E, list(out.report.losses.values()), grads

    kernel, oracle = both(run)
    assert torch.equal(kernel[1], oracle[1])
    torch.testing.assert_close(kernel, oracle, rtol=1e-4, atol=1e-5)


def test_the_kernels_are_what_runs(monkeypatch):
    """Each of the five files is entered by a step, so the comparisons above compare two things."""
    from diffusion_moe.moe.kernels import activation, combine, grouped_matmul, router, sort

    called = set()
    for module, name in (
        (activation, "weighted_activation"),
        (activation, "weighted_activation_backward_"),
        (combine, "combine"),
        (grouped_matmul, "gmm"),
        (grouped_matmul, "gmm_wgrad"),
        (router, "grouped_topk"),
        (router, "grouped_topk_backward"),
        (sort, "sort_by_expert"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: called.add(n) or f(*a))
    layer = MoEFeedForward(6, 10, RouterConfig("dsmoe", num_experts=4, top_k=2))
    with backend.use("triton"):
        layer(torch.randn(2, 5, 6)).hidden_states.sum().backward()
    assert called == {
        *("weighted_activation", "weighted_activation_backward_", "combine", "gmm", "gmm_wgrad"),
        *("grouped_topk", "grouped_topk_backward", "sort_by_expert"),
    }


def test_float64_is_always_torchs(monkeypatch):
    from diffusion_moe.moe.kernels import activation, combine, grouped_matmul, router

    kernels = ((activation, "weighted_activation"), (combine, "combine"), (router, "grouped_topk"))
    for module, name in (*kernels, (grouped_matmul, "gmm"), (grouped_matmul, "gmm_wgrad")):
        monkeypatch.setattr(module, name, None)
    layer = MoEFeedForward(6, 10, RouterConfig("dsmoe", num_experts=4, top_k=2)).double()
    x_BND = torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
    with backend.use("triton"):
        assert torch.autograd.gradcheck(lambda x: layer(x).hidden_states, x_BND)


@pytest.mark.parametrize("router", ["dsmoe", "diffmoe"])
def test_compiles_to_one_graph_of_operators(router):
    layer = MoEFeedForward(6, 10, RouterConfig(router, num_experts=4, top_k=2, capacity=2.0, balance="aux"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9):
        x_BND = torch.randn(2, tokens, 6)
        with backend.use("triton"):
            expected, actual = layer(x_BND), compiled(x_BND)
            gradients = [torch.autograd.grad(y.hidden_states.sum(), layer.experts.w_in)[0] for y in (expected, actual)]
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
