"""Expert threshold routing: its choices, its moving thresholds, and that a batch may be split in any way."""

import pytest
import torch

from diffusion_moe.config import read_recipe
from diffusion_moe.data import batches_from, load_dataset
from diffusion_moe.moe import (
    MoEFeedForward,
    RouterConfig,
    experts_loop,
    merge_reports,
    routers_of,
    update_routing_state,
)
from diffusion_moe.moe.threshold import ThresholdRouter
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step


def make_router(num_experts=4, dim=6, **settings):
    return ThresholdRouter(dim, RouterConfig("threshold", num_experts, **settings))


@pytest.mark.parametrize("training", [True, False])
def test_an_expert_takes_what_reaches_its_threshold_whoever_else_is_there(gates, training):
    router, x_BND = make_router().train(training), torch.randn(3, 9, 6)
    router.threshold.copy_(torch.tensor([-0.5, 0.0, 0.5, 99.0]))
    logits_TE = (x_BND.flatten(0, 1).double() @ router.weight.double().T).detach()
    expected_TE = torch.where(logits_TE >= router.threshold, logits_TE.sigmoid(), 0)
    assert 0 < (expected_TE != 0).sum() < 27 * 3
    routing = router(x_BND)
    together = gates(routing, 27)
    torch.testing.assert_close(together.double(), expected_TE, rtol=1e-5, atol=1e-6)
    assert routing.report.counts_E.tolist() == (expected_TE != 0).sum(0).tolist() and routing.report.counts_E[3] == 0
    assert (routing.report.scores_TE is None) is not training
    for b in range(3):
        torch.testing.assert_close(together[9 * b : 9 * (b + 1)], gates(router(x_BND[b : b + 1]), 9))


@pytest.mark.parametrize("threshold", [0.0, 99.0])
def test_outputs_and_all_gradients_equal_a_plain_loop_also_without_any_choice(threshold):
    layer = MoEFeedForward(6, 8, RouterConfig("threshold", 4), bias=True, shared="swiglu")
    layer.router.threshold.fill_(threshold)
    x_BND = torch.randn(2, 8, 6, requires_grad=True)
    routing = layer.router(x_BND)
    assert (len(routing.token_A) > 0) == (threshold == 0)
    plain = experts_loop(layer.experts, x_BND.flatten(0, 1), routing).view_as(x_BND) + layer.shared(x_BND)
    out = layer(x_BND).hidden_states
    torch.testing.assert_close(out, plain)
    parameters = [x_BND, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (out, plain))):
        torch.testing.assert_close(torch.zeros(()) if a is None else a, torch.zeros_like(a) if b is None else b)


def test_thresholds_are_a_moving_average_of_the_steps_quantiles_however_it_is_split():
    routers = [make_router(capacity=1.5, threshold_decay=0.75) for _ in range(3)]
    for router in routers[1:]:
        router.load_state_dict(routers[0].state_dict())
    weights, expected_E = 0.0, torch.zeros(4)
    for _ in range(3):
        x_BND = torch.randn(4, 6, 6)
        scores_TE = (x_BND.flatten(0, 1) @ routers[0].weight.T).detach()
        kth_E = scores_TE.sort(0, descending=True).values[8]  # int(24 / 4 * 1.5) = 9
        weights, expected_E = 0.75 * weights + 1, 0.75 * expected_E + kth_E
        for router, size in zip(routers, (4, 2, 1)):
            report = merge_reports([router(part).report for part in x_BND.split(size)])
            update_routing_state([router], [report])
        torch.testing.assert_close(routers[0].threshold, expected_E / weights, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(router.threshold, routers[0].threshold) for router in routers)


def test_the_first_batch_of_normal_tokens_gets_about_the_capacity():
    for capacity in (0.5, 1.0, 4.0, 8.0):
        router = make_router(8, dim=64, capacity=capacity)
        served = router(torch.randn(16, 256, 64)).report.counts_E / 4096
        torch.testing.assert_close(served, torch.full((8,), capacity / 8), rtol=0, atol=0.02)


def test_loads_become_even_on_uneven_tokens():
    """A common direction of all tokens gives experts different scores; thresholds make up for it in a few steps."""
    router, loads = make_router(8, dim=16, capacity=2.0, threshold_decay=0.5), []
    for _ in range(6):
        report = router(torch.randn(8, 128, 16) + 2.0).report
        loads.append(report.counts_E / 1024)
        update_routing_state([router], [report])
    assert loads[0].max() > 3 * 2 / 8
    assert (loads[-1] - 2 / 8).abs().max() < 0.05


@pytest.mark.parametrize("options", [[], ["--training.recompute=blocks"]], ids=["kept", "recomputed"])
def test_micro_batches_take_the_step_of_the_whole_batch(tiny, options):
    """The choices of one step depend on no batch, so weights differ by rounding alone, and thresholds hardly."""
    states = []
    for accumulation in (1, 4):
        more = [*options, f"--training.accumulation={accumulation}", "--optimizer.eps=1e-5"]
        recipe = read_recipe("digits", [*tiny, "--model.router=threshold", *more])
        state, data = make_state(recipe, torch.device("cpu")), load_dataset(recipe.data, "train")
        order = batches_from(0, 3, len(data), recipe.training.batch_size, recipe.training.seed)
        results = [train_step(state, recipe, data.__getitems__(indices)) for indices in order]
        assert all(result.finite for result in results)
        states.append(state)
    for router, other in zip(*(routers_of(state.model) for state in states)):
        assert float(router.num_updates) == len(results) == 3
        torch.testing.assert_close(other.threshold, router.threshold, rtol=1e-5, atol=1e-5)
    for p, other in zip(*(state.model.parameters() for state in states)):
        torch.testing.assert_close(other, p, rtol=1e-4, atol=2e-5)
