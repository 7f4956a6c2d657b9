"""The MoE layer on a CUDA device."""

import pytest
import torch
from router_context import with_context

from diffusion_moe.moe import MoEFeedForward, RouterConfig, experts_loop
from diffusion_moe.routing_rules import RULES

pytestmark = pytest.mark.gpu


def make_layer(kind):
    config = RouterConfig(kind, num_experts=8, top_k=2, capacity=2.0, balance="aux")
    return with_context(MoEFeedForward(64, 32, config, shared="swiglu").cuda())


@pytest.mark.parametrize("kind", [kind for kind, rule in RULES.items() if rule.has_fixed_rows])
def test_training_forward_and_backward_never_wait_for_the_device(kind):
    """bfloat16 on compute capability 9.0 and newer; float32 products synchronise inside torch."""
    layer, x = make_layer(kind), torch.randn(4, 64, 64, device="cuda", requires_grad=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(x)
        (out.hidden_states.square().mean() + sum(out.report.losses.values())).backward()

    step()  # the first pass may set up libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", RULES)
def test_experts_equal_the_loop(kind):
    layer, x = make_layer(kind), torch.randn(256, 64, device="cuda")
    routing = layer.router(x[None])
    expected = experts_loop(layer.experts, x, routing)
    torch.testing.assert_close(layer.experts(x, routing), expected, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(layer.experts(x, routing), expected, rtol=5e-2, atol=5e-2)
