"""Expert Race against a plain loop over all pairs of token and expert."""

import copy

import pytest
import torch
import torch.nn.functional as F

from diffusion_moe.config import read_recipe
from diffusion_moe.diffusion.path import rectified_flow
from diffusion_moe.models import make_model
from diffusion_moe.moe import (
    MoEFeedForward,
    RouterConfig,
    experts_loop,
    merge_reports,
    routers_of,
    scale_thresholds,
    update_routing_state,
)
from diffusion_moe.moe.logit_threshold import scaled_threshold
from diffusion_moe.moe.race import RaceRouter, similarity_loss
from diffusion_moe.nn.embeddings import patchify
from diffusion_moe.training.loss import loss_at


def make_router(num_experts=4, **settings):
    return RaceRouter(6, RouterConfig("race", num_experts, **settings))


def scores_by_hand(router, x_BND):
    """Logits of each pair in float64, (T, E)."""
    hidden, x_TD = copy.deepcopy(router.hidden).double(), x_BND.flatten(0, 1).double()
    h_TD = F.gelu(x_TD @ hidden.weight.T + hidden.bias)
    return (h_TD @ router.weight.double().T).detach()


@pytest.mark.parametrize(("capacity", "winners"), [(1.0, 21), (1.7, 35), (0.01, 1), (4.0, 84)])
def test_the_best_pairs_of_the_whole_batch_win(gates, capacity, winners):
    router, x_BND = make_router(capacity=capacity), torch.randn(3, 7, 6)
    scores_TE = scores_by_hand(router, x_BND)
    ranked = sorted(((s, t, e) for t, row in enumerate(scores_TE.tolist()) for e, s in enumerate(row)), reverse=True)
    expected_TE = torch.zeros(21, 4, dtype=torch.float64)
    for score, token, expert in ranked[:winners]:
        expected_TE[token, expert] = score
    routing = router(x_BND)
    assert len(routing.token_A) == int(routing.report.counts_E.sum()) == winners
    torch.testing.assert_close(gates(routing, 21).double(), expected_TE, rtol=1e-5, atol=1e-6)
    assert float(routing.report.threshold_E) == pytest.approx(ranked[winners - 1][0], rel=1e-5)
    assert routing.report.dropped is None


def similarity_by_hand(logits_TE, chosen_TE):
    """Eqs. 9-11 pair by pair."""
    T, E = logits_TE.shape
    share_TE, taken_TE = logits_TE.softmax(-1), chosen_TE.to(logits_TE.dtype)
    shared = {(i, j): float(taken_TE[:, i] @ taken_TE[:, j]) for i in range(E) for j in range(E)}
    alone = sum(count for (i, j), count in shared.items() if i == j)
    together = sum(count for (i, j), count in shared.items() if i != j)
    total = logits_TE.new_zeros(())
    for (i, j), count in shared.items():
        weight = E * count / alone if i == j else (E * E - E) * count / together if together else 0.0
        total = total + weight * (share_TE[:, i] @ share_TE[:, j])
    return total / T


@pytest.mark.parametrize("case", ["some", "one a token", "none"])
def test_similarity_loss_equals_the_sum_over_pairs_of_experts(case):
    logits_TE = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    chosen_TE = {
        "some": torch.rand(9, 5) < 0.4,
        "one a token": F.one_hot(torch.arange(9) % 5, 5).bool(),
        "none": torch.zeros(9, 5, dtype=torch.bool),
    }[case]
    expected = similarity_by_hand(logits_TE, chosen_TE) if case != "none" else logits_TE.sum() * 0
    taken_EE = chosen_TE.double().T @ chosen_TE.double()
    actual = similarity_loss(logits_TE, taken_EE)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(loss, logits_TE) for loss in (actual, expected))):
        torch.testing.assert_close(a, b)


def test_similarity_loss_is_one_for_equal_scores_and_more_for_experts_that_do_the_same():
    """Figure 4: with even loads, pairs of experts with the same tokens cost more than experts of their own."""
    same_TE = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    other_TE = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]], dtype=torch.bool)
    taken = [chosen.float().T @ chosen.float() for chosen in (same_TE, other_TE)]
    assert float(similarity_loss(torch.zeros(4, 4), taken[0])) == pytest.approx(1)
    alike, spread = (similarity_loss(3.0 * c.float(), t) for c, t in zip((same_TE, other_TE), taken))
    assert alike > 1.2 * spread


def test_the_losses_are_weighted_and_for_training_only():
    x_BND = torch.randn(2, 8, 6)
    light, heavy = make_router(target_dim=3), make_router(target_dim=3, similarity_loss_weight=1e-3)
    heavy.load_state_dict(light.state_dict())
    losses = [router(x_BND).report.losses for router in (light, heavy)]
    torch.testing.assert_close(losses[1]["similarity"], 10 * losses[0]["similarity"])
    report = light.eval()(x_BND).report
    assert report.losses == {} and report.predicted_BNP is None and report.threshold_E is None


def test_outputs_and_all_gradients_equal_a_plain_loop():
    """Also with negative weights, which identity gating gives where most pairs win."""
    layer = MoEFeedForward(6, 8, RouterConfig("race", 4, capacity=3.0, similarity_loss_weight=0.5), bias=True)
    router, x_BND = layer.router, torch.randn(2, 8, 6, requires_grad=True)
    parameters = [x_BND, *layer.parameters()]
    out = layer(x_BND)
    loss = out.hidden_states.square().sum() + out.report.losses["similarity"]
    routing = router(x_BND)
    assert (routing.weight_A < 0).any()
    logits_TE = F.gelu(router.hidden(x_BND)).flatten(0, 1) @ router.weight.T
    won_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    won_TE[routing.token_A, routing.expert_A()] = True
    plain_TD = torch.zeros(16, 6)
    for e in range(4):
        alone = routing._replace(
            token_A=torch.arange(16), weight_A=logits_TE[:, e] * won_TE[:, e],
            offsets_E=torch.tensor([0] * e + [16] * (4 - e), dtype=torch.int32),
        )  # fmt: skip
        plain_TD = plain_TD + experts_loop(layer.experts, x_BND.flatten(0, 1), alone)
    expected = plain_TD.square().sum() + 0.5 * similarity_by_hand(logits_TE, won_TE)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(value, parameters) for value in (loss, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# At inference


def test_inference_takes_what_reaches_the_threshold_image_by_image(gates):
    router, x_BND = make_router(capacity=1.5).eval(), torch.randn(3, 9, 6)
    router.threshold.fill_(0.2)
    scores_TE = scores_by_hand(router, x_BND)
    expected_TE = torch.where(scores_TE >= 0.2, scores_TE, 0)
    assert 0 < (expected_TE != 0).sum() < 27 * 4
    together = gates(router(x_BND), 27)
    torch.testing.assert_close(together.double(), expected_TE, rtol=1e-5, atol=1e-6)
    for b in range(3):
        torch.testing.assert_close(together[9 * b : 9 * (b + 1)], gates(router(x_BND[b : b + 1]), 9))


def test_a_capacity_limit_drops_the_least_logits_also_negative_ones(gates):
    router, x_BND = make_router().eval(), torch.randn(2, 8, 6)
    router.threshold.fill_(-torch.inf)
    router.capacity_limit = 3.5
    routing, scores_TE = router(x_BND), scores_by_hand(router, x_BND)
    lowest = scores_TE.flatten().sort(descending=True).values[55]
    assert lowest < 0 and int(routing.report.dropped) == 64 - 56
    torch.testing.assert_close(
        gates(routing, 16).double(), torch.where(scores_TE >= lowest, scores_TE, 0), rtol=1e-5, atol=1e-6
    )


def test_a_scale_of_thresholds_scales_probabilities():
    threshold = torch.tensor([-2.0, 0.0, 3.0])
    assert scaled_threshold(threshold, 1.0) is threshold
    torch.testing.assert_close(scaled_threshold(threshold, 0.5).sigmoid(), threshold.sigmoid() / 2)
    assert torch.equal(scaled_threshold(threshold, 1.2)[2:], torch.tensor([torch.inf]))
    layer, x_BND = MoEFeedForward(6, 8, RouterConfig("race", 4)).eval(), torch.randn(4, 16, 6)
    served = []
    for scale in (0.5, 1.0, 1.5):
        scale_thresholds(layer, scale)
        served.append(int(layer(x_BND).report.counts_E.sum()))
    assert served[0] > served[1] > served[2]


def test_the_threshold_is_a_moving_average_whose_first_value_counts_whole():
    router, observed = make_router(threshold_decay=0.5), [2.0, 5.0, -1.0]
    report = router(torch.randn(1, 4, 6)).report
    for value in observed:
        update_routing_state([router], [report._replace(threshold_E=torch.tensor([value]))])
    weights = [0.5**2, 0.5, 1.0]
    assert float(router.threshold) == pytest.approx(sum(map(float.__mul__, weights, observed)) / sum(weights))
    parts = [router(x).report for x in torch.randn(4, 8, 6).split(2)]
    merged = merge_reports(parts)
    torch.testing.assert_close(merged.threshold_E, (parts[0].threshold_E + parts[1].threshold_E) / 2)


# Per-layer regularization


def test_every_layer_learns_the_target_of_its_tokens(tiny):
    """Also where class tokens stand before those of the image, which have no target."""
    jit = ["--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=6", "--model.class_tokens=2"]
    for options in ([], [*jit, "--model.class_tokens_from=0", "--diffusion.loss=velocity"]):
        recipe = read_recipe("digits", [*tiny, "--model.router=race", "--model.target_loss_weight=0.3", *options])
        model = make_model(recipe.model).train()
        images, noise, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.rand(3)
        labels, seen = torch.arange(3), []
        (router,) = routers_of(model)
        router.register_forward_hook(lambda _, args, routing, seen=seen: seen.append(routing.report.predicted_BNP))
        parts = loss_at(model, recipe, images, labels, noise, t)
        point = rectified_flow(images, recipe.model.noise_scale * noise, t)
        target_BNP = patchify(getattr(point, recipe.model.prediction), recipe.model.patch_size)
        loss = 0.3 * (seen[0][:, -target_BNP.shape[1] :] - target_BNP).square().mean()
        torch.testing.assert_close(parts.routers["target"], loss)
        assert all(report.predicted_BNP is None for report in parts.reports)
        gradients = torch.autograd.grad(parts.routers["target"], [router.target.weight, router.hidden.weight])
        assert all(gradient.abs().max() > 0 for gradient in gradients)
