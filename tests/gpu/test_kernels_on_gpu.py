"""The Triton kernels compiled and run on a CUDA device, against torch on the same device."""

import pytest
import torch

from diffusion_moe.moe import (
    FeedForward,
    GroupedExperts,
    MoEFeedForward,
    RouterConfig,
    backend,
    experts_loop,
    route_by_mask,
    route_by_token,
)
from diffusion_moe.moe.activation import weighted_activation, weighted_activation_backward_
from diffusion_moe.moe.grouped_topk import grouped_topk
from diffusion_moe.moe.ops import combine
from diffusion_moe.moe.routing import sort_by_expert

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
BOUND = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2.0**-7, 1e-6), torch.float16: (2.0**-10, 1e-6)}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Whatever the shell says."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    torch.manual_seed(0)


def both(function):
    """With the kernels, twice, and with torch. The two with kernels agree bit for bit: nothing adds in any order."""
    with backend.use("triton"):
        once, again = function(), function()
    for x, y in zip(once, again):
        assert torch.equal(x, y)
    with backend.use("torch"):
        return once, function()


def close(actual, expected, dtype):
    rtol, atol = BOUND[dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def backward(h_AH, weight_A, grad_AF, kind):
    """The weighted activation and both gradients; the gradient given is left alone."""
    out_AF = grad_AF.clone(memory_format=torch.contiguous_format)
    return out_AF, *weighted_activation_backward_(h_AH, weight_A, out_AF, kind)


@DTYPES
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1000, 6), (5000, 128), (777, 1152), (33, 3000)])
def test_activation(kind, rows, width, dtype):
    """One rounding apart at most; the weights' gradient is a sum of `width` float32 products."""
    h_AH = torch.randn(rows, 2 * width if kind == "swiglu" else width, device=DEVICE).to(dtype)
    weight_A, grad_AF = torch.rand(rows, device=DEVICE), torch.randn(rows, width, device=DEVICE).to(dtype)
    close(*both(lambda: (weighted_activation(h_AH, weight_A, kind, dtype),)), dtype)
    kernel, oracle = both(lambda: backward(h_AH, weight_A, grad_AF, kind))
    close(kernel[:2], oracle[:2], dtype)
    torch.testing.assert_close(kernel[2], oracle[2], rtol=1e-4, atol=1e-5 * width**0.5)


@DTYPES
@pytest.mark.parametrize("kind", ["swiglu", "gelu", "silu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1000, 6), (5000, 128), (777, 1152), (33, 3000)])
def test_activation_without_weights(kind, rows, width, dtype):
    """Torch's operators round gates and products on the way in narrow dtypes: three roundings apart at most."""
    h_AH = torch.randn(rows, 2 * width if kind == "swiglu" else width, device=DEVICE).to(dtype)
    grad_AF = torch.randn(rows, width, device=DEVICE).to(dtype)
    rtol, atol = (4 * bound for bound in BOUND[dtype])
    forward = both(lambda: (weighted_activation(h_AH, None, kind, dtype),))
    for kernel, oracle in (forward, both(lambda: backward(h_AH, None, grad_AF, kind))):
        torch.testing.assert_close(kernel, oracle, rtol=rtol, atol=max(atol, rtol * 1e-2))


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_feed_forward_network(kind, bias):
    """With the kernels against torch's operators, in bfloat16: answer and all gradients."""
    network = FeedForward(384, 512, kind, bias).to(DEVICE)
    x = torch.randn(4, 256, 384, device=DEVICE, requires_grad=True)

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            y = network(x)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, *network.parameters()))

    kernel, oracle = both(run)
    for actual, expected in zip(kernel, oracle):
        assert actual.dtype == expected.dtype
        assert (actual.float() - expected.float()).norm() < 1e-2 * expected.float().norm()


@DTYPES
@pytest.mark.parametrize("per_token", [1, 2, 5, 20])
@pytest.mark.parametrize("dim", [8, 384, 1152, 3000])
def test_sum_of_equally_many_rows(per_token, dim, dtype):
    rows = 300 * per_token
    y_AD, row_A = torch.randn(rows, dim, device=DEVICE).to(dtype), torch.randperm(rows, device=DEVICE)
    start_T = torch.arange(300, device=DEVICE) * per_token
    kernel, oracle = both(lambda: (combine(y_AD, row_A, start_T, per_token),))
    close(kernel, oracle, dtype)
    with backend.use("triton"):
        assert torch.equal(combine(y_AD, row_A, start_T), kernel[0])


@DTYPES
def test_sum_of_any_number_of_rows(dtype):
    counts_T = torch.randint(0, 6, (500,), device=DEVICE)
    rows = int(counts_T.sum())
    y_AD, row_A = torch.randn(rows, 384, device=DEVICE).to(dtype), torch.randperm(rows, device=DEVICE)
    start_T = counts_T.cumsum(0) - counts_T
    kernel, oracle = both(lambda: (combine(y_AD, row_A, start_T),))
    close(kernel, oracle, dtype)
    assert torch.all(kernel[0][counts_T == 0] == 0)


@pytest.mark.parametrize(
    ("assignments", "experts"),
    [(0, 4), (1, 1), (511, 3), (512, 16), (513, 16), (81920, 48), (327680, 48), (4096, 256), (4096, 257), (999, 1024)],
)
def test_counting_sort_is_the_stable_sort(assignments, experts):
    expert_A = torch.randint(experts, (assignments,), device=DEVICE)
    for kernel, oracle in zip(*both(lambda: sort_by_expert(expert_A, experts))):
        assert kernel.dtype == oracle.dtype and torch.equal(kernel, oracle)
    for kernel, oracle in zip(*both(lambda: sort_by_expert(torch.zeros_like(expert_A), experts))):
        assert torch.equal(kernel, oracle)


@pytest.mark.parametrize(
    ("experts", "groups", "topk_group", "top_k"),
    [
        *[(16, 1, 1, 2), (48, 1, 1, 5), (48, 8, 4, 5), (6, 3, 2, 2)],
        *[(256, 8, 4, 8), (1024, 1, 1, 8), (7, 1, 1, 7), (5, 1, 1, 1)],
    ],
)
@pytest.mark.parametrize("correction", [0.0, 0.5, -0.9])
def test_router(experts, groups, topk_group, top_k, correction):
    """The same experts, weights and gradients. Distinct scores a hundredth of their mean distance apart: where two are
    as close as a rounding, either may be chosen."""
    order_TE = torch.rand(3000, experts, device=DEVICE).argsort(1)
    jitter_TE = torch.rand(3000, experts, device=DEVICE)
    score_TE = 0.05 + 0.9 * (order_TE + 0.98 * jitter_TE) / experts
    logits_TE = torch.logit(score_TE).requires_grad_()
    correction_E = correction * (torch.arange(experts, device=DEVICE) % 2)
    direction_TE = torch.randn(3000, experts, device=DEVICE)

    def run():
        weight_TK, expert_TK, _ = grouped_topk(logits_TE, correction_E, top_k, groups, topk_group, 2.5, correction < 0)
        loss = (weight_TK * direction_TE.gather(1, expert_TK)).sum()
        dense_TE = torch.zeros_like(direction_TE).scatter(1, expert_TK, weight_TK.detach())
        return dense_TE, torch.autograd.grad(loss, logits_TE)[0]

    kernel, oracle = both(run)
    same_T = ((kernel[0] > 0) == (oracle[0] > 0)).all(1)
    assert same_T.float().mean() > 0.999, "only near ties may differ"
    torch.testing.assert_close(kernel[0][same_T], oracle[0][same_T], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kernel[1][same_T], oracle[1][same_T], rtol=1e-4, atol=1e-5)


def test_equal_scores_go_to_the_lowest_number_and_nan_stays_in_range():
    with backend.use("triton"):
        logits_TE = torch.zeros(100, 48, device=DEVICE)
        logits_TE[50:] = torch.nan
        expert_TK = grouped_topk(logits_TE, torch.zeros(48, device=DEVICE), 5, 8, 4)[1]
    assert torch.equal(expert_TK, torch.arange(5, device=DEVICE).expand(100, 5))


@pytest.mark.parametrize("kind", ["by token", "by mask"])
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("gelu", False), ("gelu", True)])
def test_experts_equal_the_loop(kind, activation, bias):
    experts = GroupedExperts(64, 96, 8, activation, bias).to(DEVICE)
    x_TD = torch.randn(300, 64, device=DEVICE, requires_grad=True)
    weight_TE = torch.rand(300, 8, device=DEVICE, requires_grad=True)
    direction = torch.randn(300, 64, device=DEVICE)
    inputs = (x_TD, weight_TE, *experts.parameters())
    with backend.use("triton"):
        if kind == "by token":
            expert_TK = torch.rand(300, 8, device=DEVICE).argsort(1)[:, :3]
            routing = route_by_token(expert_TK, weight_TE.gather(1, expert_TK), 8)
        else:
            routing = route_by_mask(torch.rand(300, 8, device=DEVICE) < 0.3, weight_TE)
        y_TD = experts(x_TD, routing)
        grads = torch.autograd.grad(y_TD, inputs, direction, retain_graph=True)
    expected_TD = experts_loop(experts, x_TD, routing)
    expected = torch.autograd.grad(expected_TD, inputs, direction, materialize_grads=True)
    torch.testing.assert_close((y_TD, *grads), (expected_TD, *expected), rtol=1e-3, atol=1e-3)


def test_auto_runs_the_kernels_here():
    """On this device, without being asked: the profiler sees them by name."""
    layer = MoEFeedForward(64, 32, RouterConfig("dsmoe", num_experts=8, top_k=2)).to(DEVICE)
    x = torch.randn(2, 64, 64, device=DEVICE)
    layer(x).hidden_states.sum().backward()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(x).hidden_states.sum().backward()
        torch.cuda.synchronize()
    names = {event.key for event in profile.key_averages()}
    assert {"_activation_forward", "_activation_backward", "_combine", "_choose_experts", "_router_backward"} <= names
    assert {"_count_by_block", "_add_up_counts", "_place_assignments"} <= names


def test_one_compilation_serves_every_batch_size():
    """Sizes of the batch are plain arguments: neither 1 nor a multiple of 16 makes a kernel of its own."""
    from diffusion_moe.moe.kernels import activation, combine, router, sort

    kernels = [
        activation._activation_forward,
        activation._activation_backward,
        combine._combine,
        router._choose_experts,
        router._router_backward,
    ]
    kernels += [sort._count_by_block, sort._add_up_counts, sort._place_assignments]
    layer = MoEFeedForward(80, 40, RouterConfig("dsmoe", num_experts=10, top_k=3)).to(DEVICE)

    def run(tokens):
        layer(torch.randn(1, tokens, 80, device=DEVICE)).hidden_states.sum().backward()
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    with backend.use("triton"):
        assert run(16) == run(1) == run(100) == run(257)


def test_sampling_replays_from_a_cuda_graph():
    """No kernel waits for the host or allocates outside the graph's pool."""
    layer = MoEFeedForward(64, 32, RouterConfig("dsmoe", num_experts=8, top_k=2)).to(DEVICE, torch.bfloat16).eval()
    x, other = torch.randn(2, 2, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(other).hidden_states
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x).hidden_states
        x.copy_(other)
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("router", ["dsmoe", "diffmoe"])
def test_compiles_to_one_graph(router):
    config = RouterConfig(router, num_experts=8, top_k=2, capacity=2.0, balance="aux")
    layer = MoEFeedForward(64, 32, config, shared="swiglu").to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (64, 128):
        x = torch.randn(2, tokens, 64, device=DEVICE, requires_grad=True)
        results = []
        for function in (layer, compiled):
            with torch.autocast("cuda", torch.bfloat16):
                y = function(x).hidden_states
            results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, *layer.experts.parameters()))))
        for eager, whole in zip(*results):
            assert (eager - whole).norm() < 2e-2 * eager.norm()
