"""The naive loop computes what our layer does, so that their times may be compared."""

import pytest
import torch
from naive_loop import LoopMoE, dense_equivalent

from diffusion_moe.moe import MoEFeedForward, RouterConfig


def make_layer(kind, shared="swiglu", activation="swiglu", bias=False, **settings):
    torch.manual_seed(0)
    router = RouterConfig(kind, 4, **{"top_k": 2, "capacity": 2.0, **settings})
    layer = MoEFeedForward(8, 16, router, activation, bias, shared)
    if bias:
        torch.nn.init.normal_(layer.experts.b_in)
        torch.nn.init.normal_(layer.experts.b_out)
    if kind == "diffmoe":
        layer.router.threshold.fill_(0.5)
    return layer


@pytest.mark.parametrize("kind", ["tc", "ec", "diffmoe", "dsmoe"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("activation", "bias", "shared"), [("swiglu", False, "swiglu"), ("gelu", True, "identity")])
def test_loop_and_layer_agree_in_output_and_gradients(kind, training, activation, bias, shared):
    layer = make_layer(kind, shared, activation, bias).train(training)
    loop = LoopMoE(layer).train(training)
    x = torch.randn(3, 6, 8, requires_grad=True)
    results = []
    for module in (layer, loop):
        out = module(x)
        loss = out.hidden_states.square().sum() + sum(out.report.losses.values())
        results.append((out.hidden_states, *torch.autograd.grad(loss, (x, layer.router.weight))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shared", "bias"), [("swiglu", False), ("none", True)])
def test_the_dense_layer_has_the_activated_parameters(shared, bias):
    layer = make_layer("dsmoe", shared, bias=bias)
    an_expert = sum(p[0].numel() for p in layer.experts.parameters())
    activated = 2 * an_expert + (sum(p.numel() for p in layer.shared.parameters()) if layer.shared else 0)
    dense = sum(p.numel() for p in dense_equivalent(layer, 2).parameters())
    assert abs(dense - activated) <= (8 if bias else 0)  # one output bias for two
