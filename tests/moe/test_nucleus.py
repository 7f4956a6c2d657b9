"""Nucleus-Image's rule against a plain loop; what its router sees and what its experts see; capacities of layers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion_moe.config import ModelConfig
from diffusion_moe.counts import model_size, num_assignments
from diffusion_moe.models import load_model, make_model, save_model
from diffusion_moe.moe import ROUTERS, MoEFeedForward, RouterConfig, RoutingContext, experts_loop, routers_of

SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "num_heads": 2, "num_classes": 3,
    "router": "nucleus", "num_experts": 4, "expert_dim": 16, "routed_scaling_factor": 2.5,
}  # fmt: skip
"""Settings of a small model."""


def weights_by_hand(router, x_ND, time_D, capacity, scale):
    """One image's weights, (N, E), as a loop over experts in float64."""
    joined = torch.cat((time_D.expand(len(x_ND), -1), x_ND), dim=1).double()
    matrix = torch.cat((router.time_weight, router.weight), dim=1).double()
    score_NE = (joined @ matrix.T).softmax(dim=1)
    C = max(1, math.ceil(capacity * len(x_ND) / len(matrix)))
    taken_NE = torch.zeros_like(score_NE)
    for e in range(len(matrix)):
        for n in sorted(range(len(x_ND)), key=lambda n, e=e: -score_NE[n, e].item())[:C]:
            taken_NE[n, e] = score_NE[n, e]
    return scale * taken_NE / (taken_NE.sum(1, keepdim=True) + 1e-12)


def make_router(**settings):
    """A router whose scores differ well."""
    router = ROUTERS["nucleus"](6, RouterConfig("nucleus", 4, routed_scaling_factor=2.5, **settings))
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return router


@pytest.mark.parametrize(
    ("capacity", "tokens", "taken"), [(1.0, 8, 2), (1.0, 9, 3), (1.3, 8, 3), (0.1, 8, 1), (4, 8, 8)]
)
def test_choices_and_weights_are_those_of_a_plain_loop(gates, capacity, tokens, taken):
    router, x_BND, time_BD = make_router(capacity=capacity), torch.randn(3, tokens, 6), torch.randn(3, 6)
    routing = router(x_BND, RoutingContext(time_embedding_BD=time_BD))
    expected = torch.cat([weights_by_hand(router, x, time, capacity, 2.5) for x, time in zip(x_BND, time_BD)])
    torch.testing.assert_close(gates(routing, 3 * tokens).double(), expected, rtol=1e-5, atol=1e-6)
    assert routing.report.counts_E.tolist() == [3 * taken] * 4
    served_T = gates(routing, 3 * tokens).sum(1)
    torch.testing.assert_close(served_T[served_T > 0], torch.full_like(served_T[served_T > 0], 2.5))


def test_a_layer_and_all_its_gradients_are_those_of_a_plain_loop():
    router = RouterConfig("nucleus", 4, capacity=1.5, routed_scaling_factor=2.5)
    layer = MoEFeedForward(6, 8, router, shared="swiglu")
    x, seen, time = (torch.randn(*shape, requires_grad=True) for shape in ((2, 8, 6), (2, 8, 6), (2, 6)))
    for parameter in layer.router.parameters():
        nn.init.normal_(parameter)
    out = layer(x, seen, RoutingContext(time_embedding_BD=time)).hidden_states
    gate_TE = torch.cat([weights_by_hand(layer.router, s, t, 1.5, 2.5) for s, t in zip(seen, time)]).float()
    expected = layer.shared(x)
    for e in range(4):
        gate, up = (x.flatten(0, 1) @ layer.experts.w_in[e]).chunk(2, dim=1)
        y_TD = (nn.functional.silu(gate) * up) @ layer.experts.w_out[e]
        expected = expected + (gate_TE[:, e : e + 1] * y_TD).view_as(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    direction, inputs = torch.randn_like(out), (x, seen, time, *layer.parameters())
    for ours, theirs in zip(*(torch.autograd.grad((y * direction).sum(), inputs) for y in (out, expected))):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_the_time_the_message_says_what_is_missing():
    with pytest.raises(ValueError, match=r"router nucleus needs time_embedding_BD; pass it in a RoutingContext"):
        MoEFeedForward(6, 8, RouterConfig("nucleus", 4))(torch.randn(2, 8, 6))


def seen_in_a_pass(model, times):
    """The router's tokens and context, and the layer's tokens, of the first MoE block."""
    seen, block = {}, model.blocks[model.settings.moe_blocks[0]]
    block.mlp.router.register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0], context=args[1]))
    block.mlp.register_forward_pre_hook(lambda _, args: seen.update(modulated=args[0]))
    block.norm2.register_forward_hook(lambda _, args, normed: seen.update(normed=normed))
    with torch.no_grad():
        model(torch.randn(2, 1, 8, 8), times, torch.tensor([0, 1]))
    return seen


def test_the_router_sees_normed_tokens_and_time_and_the_experts_modulated_tokens():
    model, times = make_model(ModelConfig(depth=2, **SMALL)), torch.tensor([0.2, 0.9])
    for block in model.blocks:
        nn.init.normal_(block.adaln[1].weight)
    seen = seen_in_a_pass(model, times)
    assert torch.equal(seen["tokens"], seen["normed"])
    assert (seen["modulated"] - seen["normed"]).abs().max() > 0.1
    embedding = model.t_embedder(times)
    norm = embedding.square().mean(dim=1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(seen["context"].time_embedding_BD, embedding / norm)


def test_the_time_changes_the_routing_of_the_same_tokens():
    router, x_BND = make_router(capacity=1.0), torch.randn(1, 8, 6)
    at = [router(x_BND, RoutingContext(time_embedding_BD=4 * torch.randn(1, 6))).token_A.tolist() for _ in range(2)]
    assert at[0] != at[1]


def test_other_rules_are_given_nothing_else():
    model = make_model(ModelConfig(depth=2, **SMALL | {"router": "ec"}))
    seen = seen_in_a_pass(model, torch.rand(2))
    assert seen["context"] is None and torch.equal(seen["tokens"], seen["modulated"])


# Dense blocks at both ends, and a capacity for each layer

LAYOUT = {"depth": 6, "moe_layer_freq": 1, "first_k_dense": 3, "last_k_dense": 1, "layer_capacities": (4.0, 1.0)}


def test_the_first_three_blocks_and_the_last_are_dense_and_layers_have_their_own_capacity():
    config = ModelConfig(**SMALL, **LAYOUT)
    model = make_model(config)
    assert config.moe_blocks == (3, 4)
    assert [router.config.capacity for router in routers_of(model)] == [4.0, 1.0]
    routing = model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1])).routing
    assert [report.counts_E.tolist() for report in routing] == [[32] * 4, [8] * 4]
    assert [num_assignments(config, index, images=2) for index in (3, 4)] == [128, 32]


def test_sizes_take_the_mean_capacity():
    config = ModelConfig(**SMALL, **LAYOUT)
    assert config.experts_per_token == 2.5
    assert model_size(config) == model_size(replace(config, layer_capacities=None, capacity=2.5))


@pytest.mark.parametrize(
    ("capacities", "message"),
    [((4.0,), "are 1, but the model has 2 MoE layers"), ((4.0, 5.0), r"has 5\.0; choose"), ((4.0, 0.0), r"has 0\.0;")],
)
def test_capacities_that_do_not_fit_are_refused(capacities, message):
    with pytest.raises(ValueError, match=rf"model\.layer_capacities {message}"):
        ModelConfig(**SMALL, **LAYOUT | {"layer_capacities": capacities})


def test_a_saved_model_keeps_its_capacities(tmp_path):
    model = make_model(ModelConfig(**SMALL, **LAYOUT)).eval()
    nn.init.normal_(model.final_layer.linear.weight)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.settings == model.settings and type(loaded).from_config(loaded.config).settings == model.settings
    inputs = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1])
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)


def test_a_loop_over_experts_gives_the_models_layer():
    model = make_model(ModelConfig(**SMALL, **LAYOUT))
    layer, x_BND, time_BD = model.blocks[4].mlp, torch.randn(2, 16, 32), torch.randn(2, 32)
    context = RoutingContext(time_embedding_BD=time_BD)
    routed = experts_loop(layer.experts, x_BND.flatten(0, 1), layer.router(x_BND, context)).view_as(x_BND)
    torch.testing.assert_close(layer(x_BND, None, context).hidden_states, routed + layer.shared(x_BND))
