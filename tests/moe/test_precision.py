"""The dtype of matmuls: what autocast asks for, or float32 on processors that are faster in it."""

import itertools

import pytest
import torch
from torch import nn

from diffusion_moe.benchmarks.measure import saved_bytes
from diffusion_moe.moe import GroupedExperts, MoEFeedForward, RouterConfig, precision, route_by_token
from diffusion_moe.moe.activation import activate
from diffusion_moe.moe.precision import matmul_dtype, slower_than_float32, use_cpu_matmul

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PROCESSORS = {
    "Intel with AMX": ("GenuineIntel", "fpu avx512f avx512_bf16 amx_tile amx_bf16 avx512_fp16", {BF16, FP16}),
    "Intel without AMX": ("GenuineIntel", "fpu avx512f avx512_bf16 avx512_fp16", {FP16}),
    "AMD with AVX512-BF16": ("AuthenticAMD", "fpu avx512f avx512_bf16", {BF16}),
    "AMD with AVX2": ("AuthenticAMD", "fpu avx2 fma", set()),
    "an old Intel": ("GenuineIntel", "fpu avx2 fma", set()),
}


def cpuinfo(vendor, flags):
    """Two processors, the second of another kind: the first counts."""
    first = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: X: with a colon\nflags\t\t: {flags}\nbugs\t\t:\n"
    return f"{first}\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512_bf16 avx512_fp16\n"


@pytest.mark.parametrize(("vendor", "flags", "fast"), PROCESSORS.values(), ids=PROCESSORS)
def test_what_a_processor_multiplies_slowly(vendor, flags, fast):
    assert slower_than_float32(cpuinfo(vendor, flags)) == {BF16, FP16} - fast


@pytest.mark.parametrize("text", ["", "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\n"])
def test_nothing_is_said_of_processors_that_are_not_known(text):
    assert slower_than_float32(text) == set()


def test_matmuls_run_as_asked_or_in_float32(monkeypatch):
    x = torch.empty(1)
    monkeypatch.delenv(precision.VARIABLE, raising=False)
    monkeypatch.setattr(precision, "SLOW_DTYPES", frozenset({BF16}))
    assert [matmul_dtype(x, dtype) for dtype in (BF16, FP16, FP32, torch.float64)] == [FP32, FP16, FP32, torch.float64]
    assert matmul_dtype(torch.empty(1, device="meta"), BF16) == BF16
    monkeypatch.setenv(precision.VARIABLE, "low_precision")
    assert matmul_dtype(x, BF16) == BF16
    with use_cpu_matmul("float32"):
        assert matmul_dtype(x, FP16) == FP32
        with use_cpu_matmul("auto"):
            assert matmul_dtype(x, BF16) == FP32
        assert matmul_dtype(x, torch.float64) == torch.float64
    assert matmul_dtype(x, BF16) == BF16
    monkeypatch.setenv(precision.VARIABLE, "fp32")
    with pytest.raises(ValueError, match="DIFFUSION_MOE_CPU_MATMUL is 'fp32'; choose auto, low_precision, float32"):
        matmul_dtype(x, BF16)
    assert matmul_dtype(x, FP32) == FP32


def test_the_old_name_of_the_variable_is_refused_with_the_new_one(monkeypatch):
    monkeypatch.setenv("DIFFUSION_MOE_CPU_PRODUCTS", "narrow")
    with pytest.raises(ValueError, match=r"CPU_PRODUCTS is set; use DIFFUSION_MOE_CPU_MATMUL \(one of auto, low_pre"):
        matmul_dtype(torch.empty(1), BF16)
    assert matmul_dtype(torch.empty(1), FP32) == FP32


def rounded(h):
    """To bfloat16, with the gradient of what was there before."""
    return h + (h.bfloat16().float() - h).detach()


def results(function, inputs):
    """What it answers, and the gradients for a fixed direction."""
    y = function()
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.float(), *torch.autograd.grad(y.float(), inputs, direction)]


@pytest.mark.parametrize(("activation", "bias"), itertools.product(["swiglu", "gelu"], [True, False]))
@pytest.mark.parametrize("recompute", [True, False])
def test_experts_in_float32_round_what_they_keep_and_nothing_else(activation, bias, recompute):
    """Against a loop in float32 whose first projection is rounded: to float32's accuracy, in every gradient."""
    torch.manual_seed(0)
    experts = GroupedExperts(16, 24, 5, activation, bias)
    experts.recompute = recompute
    for b in (experts.b_in, experts.b_out) if bias else ():
        nn.init.normal_(b)
    x_TD, weight_TK = torch.randn(40, 16, requires_grad=True), torch.rand(40, 2, requires_grad=True)
    expert_TK = torch.rand(40, 5).argsort(1)[:, :2]
    inputs = (x_TD, weight_TK, *experts.parameters())

    def ours():
        with torch.autocast("cpu", BF16), use_cpu_matmul("float32"):
            return experts(x_TD, route_by_token(expert_TK, weight_TK, 5))

    def plain():
        h_TKH = torch.einsum("td,tkdh->tkh", x_TD, experts.w_in[expert_TK])
        h_TKH = h_TKH + experts.b_in[expert_TK] if bias else h_TKH
        y_TKD = torch.einsum("tkf,tkfd->tkd", activate(rounded(h_TKH), activation), experts.w_out[expert_TK])
        y_TKD = y_TKD + experts.b_out[expert_TK] if bias else y_TKD
        return (weight_TK[..., None] * y_TKD).sum(1)

    for actual, expected in zip(results(ours, inputs), results(plain, inputs)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shared", ["swiglu", "gelu", "none"])
def test_the_layer_keeps_as_much_whatever_it_multiplies_in(shared, monkeypatch):
    """Without the casts of weights that experts keep where rows are few."""
    torch.manual_seed(0)
    monkeypatch.setattr("diffusion_moe.moe.expert_autograd.KEEP_CAST_BELOW", 0)
    layer = MoEFeedForward(16, 32, RouterConfig("diffmoe", num_experts=4, capacity=2.0), shared=shared).train()
    x = torch.randn(4, 16, 16, requires_grad=True)

    def kept(choice):
        def forward():
            with torch.autocast("cpu", BF16), use_cpu_matmul(choice):
                out = layer(x)
            return out.hidden_states, *out.report.losses.values()

        return saved_bytes(forward, tuple(layer.parameters()))

    assert kept("float32") == kept("low_precision") > 0


@pytest.mark.parametrize("choice", ["low_precision", "float32"])
def test_a_compiled_layer_is_the_same(choice, monkeypatch):
    monkeypatch.setenv(precision.VARIABLE, choice)
    torch.manual_seed(0)
    layer = MoEFeedForward(16, 32, RouterConfig("dsmoe", num_experts=4, top_k=2), shared="swiglu").train()
    x = torch.randn(4, 16, 16, requires_grad=True)
    inputs = (x, *layer.parameters())

    def answer(function):
        def run():
            with torch.autocast("cpu", BF16):
                return function(x).hidden_states

        return results(run, inputs)

    torch._dynamo.reset()
    compiled = answer(torch.compile(layer, backend="aot_eager", fullgraph=True))
    eager = answer(layer)
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-5, atol=1e-6)  # closer than matmuls of the two dtypes
    for actual, expected in zip(compiled, eager):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
