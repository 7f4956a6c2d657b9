"""The Triton kernels compiled and run on a CUDA device, against torch on the same device."""

import itertools

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
from diffusion_moe.moe.ops import combine, gmm, gmm_loop, gmm_wgrad, gmm_wgrad_loop
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
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


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


# Rows of each expert: around whole tiles of 64 and 128, and with experts that have none.
COUNTS = {
    "two of 16": [162, *[0] * 14, 83],
    "one expert": [129],
    "first empty": [0, 127],
    "last empty": [128, 1, 0],
    "all but one empty": [0, 0, 64, 0],
    "E48": [*range(1, 49)],
    "E48 around tiles": [*[63, 64, 65, 0, 127, 128, 129, 0] * 6],
    "E1000": [*[3, 0] * 500],
    "no rows": [0, 0],
}


def offsets(counts):
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, device=DEVICE)


def fill_free_memory_with_nan():
    """So that results which are never written show. The blocks go back to the allocator, which gives them out again."""
    blocks = [torch.full((2**power,), torch.nan, device=DEVICE) for power in range(8, 27) for _ in range(2)]
    del blocks


def relative_error(actual, expected):
    return float((actual.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30))


# Relative to the norm. TF32 would be at about 3e-4.
ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("kernels", ["auto", "triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(384, 256), (7, 5)], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_matmul_and_its_gradients(counts, widths, dtype, kernels):
    """Against float64, whatever serves; experts without rows have gradients of exactly zero."""
    offsets_E, (dim, width) = offsets(counts), widths
    x_AD = torch.randn(sum(counts), dim, device=DEVICE).to(dtype).requires_grad_()
    w_EDF = torch.randn(len(counts), dim, width, device=DEVICE).to(dtype).requires_grad_()
    dy_AF = torch.randn(sum(counts), width, device=DEVICE).to(dtype)
    fill_free_memory_with_nan()
    with backend.use(kernels):
        y_AF = gmm(x_AD, w_EDF, offsets_E)
        dx_AD, dw_EDF = torch.autograd.grad(y_AF, (x_AD, w_EDF), dy_AF)
    x, w, dy = (t.detach().double() for t in (x_AD, w_EDF, dy_AF))
    empty_E = torch.tensor(counts, device=DEVICE) == 0
    assert torch.equal(dw_EDF[empty_E], torch.zeros_like(dw_EDF[empty_E]))
    if sum(counts):
        assert relative_error(y_AF, gmm_loop(x, w, offsets_E)) < ERROR[dtype]
        assert relative_error(dx_AD, gmm_loop(dy, w.mT, offsets_E)) < ERROR[dtype]
        assert relative_error(dw_EDF, gmm_wgrad_loop(x, dy, offsets_E)) < ERROR[dtype]


def test_grouped_matmul_follows_torchs_choice_of_tf32():
    """Ten bits of mantissa where torch may round, float32 where not."""
    counts = [100, 0, 156]
    x_AD, w_EDF = torch.randn(256, 384, device=DEVICE), torch.randn(3, 384, 256, device=DEVICE)
    expected = gmm_loop(x_AD.double(), w_EDF.double(), offsets(counts))
    errors = {}
    for allowed in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = allowed
        with backend.use("triton"):
            errors[allowed] = relative_error(gmm(x_AD, w_EDF, offsets(counts)), expected)
    assert errors["ieee"] < ERROR[torch.float32] and 5e-5 < errors["tf32"] < 2e-3


@DTYPES
def test_a_step_of_a_layer_does_not_wait_for_the_device(dtype):
    """In a float32 layer too, and in bfloat16 on devices whose grouped_mm would."""
    layer = MoEFeedForward(64, 32, RouterConfig("dsmoe", num_experts=8, top_k=2), shared="swiglu").to(DEVICE)
    x = torch.randn(2, 64, 64, device=DEVICE, requires_grad=True)

    def step():
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            y = layer(x).hidden_states
        torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("counts", [[162, *[0] * 14, 83], [0, 5], [5, 0], [0, 0, 9, 0]], ids=str)
def test_garbage_of_experts_without_rows_is_overwritten(counts):
    from diffusion_moe.moe.kernels import grouped_matmul

    dw_EDF = torch.full((len(counts), 384, 250), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    grouped_matmul.zero_empty_(dw_EDF, offsets(counts))
    for gradient, count in zip(dw_EDF, counts):
        assert gradient.isnan().all() if count else torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_grouped_matmul_of_more_than_two_to_the_31_elements(kernels):
    """The last rows, whose addresses 32 bits do not hold: of the input, and of the result. Needs 20 GB."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("less than 20 GB are free")
    rows, wide = 2**19 + 8, 4096
    offsets_E = offsets([rows - 5, 0, 5])
    x_AD = torch.randn(rows, wide, device=DEVICE, dtype=torch.bfloat16)
    w_EDF = torch.randn(3, wide, 8, device=DEVICE, dtype=torch.bfloat16)
    narrow_AF = torch.randn(rows, 8, device=DEVICE, dtype=torch.bfloat16)
    with backend.use(kernels):
        assert relative_error(gmm(x_AD, w_EDF, offsets_E)[-5:], x_AD[-5:].double() @ w_EDF[2].double()) < 4e-3
        back_AD = gmm(narrow_AF, w_EDF.mT, offsets_E)[-5:]
        assert relative_error(back_AD, narrow_AF[-5:].double() @ w_EDF[2].double().T) < 4e-3
        dw_DF = gmm_wgrad(x_AD, narrow_AF, offsets_E)[2]
        assert relative_error(dw_DF, x_AD[-5:].double().T @ narrow_AF[-5:].double()) < 4e-3


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
    assert {"_count_by_block", "_add_up_counts", "_place_assignments", "_matmul", "_weight_gradient"} <= names


def test_one_compilation_serves_every_batch_size():
    """Sizes of the batch are plain arguments: neither 1 nor a multiple of 16 makes a kernel of its own."""
    from diffusion_moe.moe.kernels import activation, combine, grouped_matmul, router, sort

    kernels = [
        activation._activation_forward,
        activation._activation_backward,
        combine._combine,
        router._choose_experts,
        router._router_backward,
    ]
    kernels += [sort._count_by_block, sort._add_up_counts, sort._place_assignments]
    kernels += [grouped_matmul._matmul, grouped_matmul._weight_gradient]
    layer = MoEFeedForward(80, 40, RouterConfig("dsmoe", num_experts=10, top_k=3)).to(DEVICE)

    def run(tokens):
        layer(torch.randn(1, tokens, 80, device=DEVICE)).hidden_states.sum().backward()
        return [sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels]

    with backend.use("triton"):
        assert run(16) == run(1) == run(100) == run(257)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sampling_replays_from_a_cuda_graph(dtype):
    """No kernel waits for the host or allocates outside the graph's pool."""
    layer = MoEFeedForward(64, 32, RouterConfig("dsmoe", num_experts=8, top_k=2)).to(DEVICE, dtype).eval()
    x, other = torch.randn(2, 2, 64, 64, device=DEVICE, dtype=dtype)
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
