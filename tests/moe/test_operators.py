"""Operators and their bodies: the same results, and operators wherever somebody looks at them."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from diffusion_moe.moe import MoEFeedForward, RouterConfig, operators
from diffusion_moe.moe.expert_matmul import GroupedMatmul
from diffusion_moe.moe.operators import is_seen, run
from diffusion_moe.moe.ops import combine
from diffusion_moe.moe.parallel import Combine, Dispatch

SUM = (torch.randn(4, 3), torch.tensor([2, 0, 1, 3]), torch.tensor([0, 2]), 2)
OPERATORS = ("gmm", "gmm_wgrad", "combine", "weighted_activation", "weighted_activation_backward_", "grouped_topk")
OPERATORS += ("sort_by_expert",)


@pytest.fixture
def layer():
    return MoEFeedForward(8, 8, RouterConfig("dsmoe", 4, top_k=2), shared="swiglu", bias=True)


def dispatched(function):
    """Names of our operators that a profiler sees while a function runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {
        event.key.removeprefix("diffusion_moe::") for event in profile.key_averages() if "diffusion_moe" in event.key
    }


def step(layer, x):
    y = layer(x).hidden_states
    return y, *torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))


def test_a_training_step_calls_bodies(layer, monkeypatch):
    """Also in the backward pass. With operators everywhere the results are the same, bit for bit."""
    x = torch.randn(2, 5, 8, requires_grad=True)
    assert not dispatched(lambda: step(layer, x)) & set(OPERATORS)
    with torch.no_grad():
        assert not dispatched(lambda: layer(x)) & set(OPERATORS)
    bodies = step(layer, x)
    monkeypatch.setattr(operators, "is_seen", lambda *_: True)
    assert dispatched(lambda: step(layer, x)) >= set(OPERATORS)
    for ours, theirs in zip(bodies, step(layer, x)):
        assert torch.equal(ours, theirs)


def test_rows_of_other_processes_are_combined_by_bodies():
    """Forward in `Combine`, backward in `Dispatch`; each is the other's gradient."""
    y_AD, row_A, start_T, per_token = SUM
    token_A = torch.tensor([0, 1, 0, 1])
    x_TD, y_AD = torch.randn(2, 3, requires_grad=True), y_AD.clone().requires_grad_()

    def both_ways():
        Dispatch.apply(x_TD, token_A, row_A, start_T, per_token).backward(y_AD.detach())
        return Combine.apply(y_AD, token_A, row_A, start_T, per_token)

    out_TD = torch.zeros(2, 3).index_add(0, token_A, y_AD)
    assert "combine" not in dispatched(lambda: torch.testing.assert_close(both_ways(), out_TD))
    torch.testing.assert_close(x_TD.grad, out_TD)


def test_flops_of_a_step_are_counted(layer):
    """Three matmuls, forward and twice backward, of 20 assignments."""
    x = torch.randn(2, 5, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).hidden_states.sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    matmul = 2 * 20 * 8 * 8
    assert counts["diffusion_moe.gmm"] == 2 * (2 + 1) * matmul
    assert sum(counts.values()) > counts["diffusion_moe.gmm"] + counts["diffusion_moe.gmm_wgrad"] > 0


def test_who_sees_operators():
    assert not is_seen(*SUM)
    with FlopCounterMode(display=False):
        assert is_seen(*SUM)
    assert is_seen(SUM[0].to("meta")) and is_seen(SUM[0].clone().requires_grad_())
    with torch.no_grad():
        assert not is_seen(torch.nn.Parameter(SUM[0]))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(SUM[0])
    assert is_seen(fake), "outside its mode too"
    seen = []
    torch.func.vmap(lambda x: seen.append(is_seen(x)) or x)(SUM[0])
    torch.jit.trace(lambda x: seen.append(is_seen(x)) or x + 1, SUM[0], check_trace=False)
    torch.compile(lambda x: seen.append(is_seen(x)) or x + 1, backend="eager")(SUM[0])
    assert seen == [True] * 3


def test_tensors_without_values_and_traces_have_operators():
    y_AD, *others = SUM
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in SUM]
    assert run(combine, *meta).shape == (2, 3) and run(combine, *meta).is_meta
    traced = make_fx(lambda y: run(combine, y, *others))(y_AD)
    assert "torch.ops.diffusion_moe.combine.default" in traced.code
    offsets_E = torch.tensor([1, 4], dtype=torch.int32)
    experts = GroupedMatmul(offsets_E)

    class Matmul(torch.nn.Module):
        def forward(self, x_AD, w_EDF):
            return experts.matmul(x_AD, w_EDF)

    with torch.no_grad():
        exported = torch.export.export(Matmul(), (y_AD, torch.randn(2, 3, 5)))
    assert "torch.ops.diffusion_moe.gmm.default" in exported.graph_module.code
