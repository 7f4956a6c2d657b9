"""ProMoE: who goes where with which weight, and the contrastive loss."""

import math

import pytest
import torch

from diffusion_moe.moe import MoEFeedForward, RouterConfig, RoutingContext
from diffusion_moe.moe.promoe import ProMoERouter, contrastive_loss

WITHOUT_CLASS = torch.tensor([False, True, False])
CONTEXT = RoutingContext(unconditional_B=WITHOUT_CLASS)


def make_router(num_experts=6, **settings) -> ProMoERouter:
    router = ProMoERouter(5, RouterConfig("promoe", num_experts, **settings)).double()
    torch.nn.init.normal_(router.weight)
    return router


def cosine(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def loss_by_loop(x_TD, chosen, prototype_RD, temperature):
    """ProMoE eq. 6, expert by expert; `chosen` are the prototypes of each token with a class."""
    members = [[t for t, experts in chosen.items() if r in experts] for r in range(len(prototype_RD))]
    means = {r: x_TD[tokens].mean(0) for r, tokens in enumerate(members) if tokens}
    total = torch.zeros((), dtype=x_TD.dtype)
    for r in means:
        score = {s: torch.cosine_similarity(prototype_RD[r], means[s], dim=0) / temperature for s in means}
        total = total - score[r] + torch.stack(list(score.values())).exp().sum().log()
    return total / len(means)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_tokens_with_a_class_take_prototypes_and_others_the_last_expert(gates, top_k):
    router, x_BND = make_router(top_k=top_k, routed_scaling_factor=2.5), torch.randn(3, 4, 5, dtype=torch.float64)
    expected_TE = torch.zeros(12, 6, dtype=torch.float64)
    for t, x_D in enumerate(x_BND.flatten(0, 1)):
        if WITHOUT_CLASS[t // 4]:
            expected_TE[t, 5] = 1.0
            continue
        cosines = [cosine(x_D, prototype_D) for prototype_D in router.weight.detach()]
        for e in sorted(range(5), key=lambda e: -cosines[e])[:top_k]:
            expected_TE[t, e] = 2.5 * cosines[e]
    routing = router(x_BND, CONTEXT)
    torch.testing.assert_close(gates(routing, 12), expected_TE)
    assert routing.report.counts_E.tolist() == (expected_TE != 0).sum(0).tolist()
    assert len(routing.token_A) == 12 * top_k, "shapes do not depend on the classes"


def test_without_labels_every_image_has_a_class():
    router, x_BND = make_router(top_k=2), torch.randn(3, 4, 5, dtype=torch.float64)
    context = RoutingContext(unconditional_B=torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(router(x_BND).report, router(x_BND, context).report)
    assert router(x_BND).report.counts_E[5] == 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loss_and_all_its_gradients_are_those_of_a_loop(top_k):
    router = make_router(top_k=top_k, contrastive_weight=0.5, contrastive_temperature=0.2)
    x_BND = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    routing = router(x_BND, CONTEXT)
    chosen = {t: set() for t in range(12) if not WITHOUT_CLASS[t // 4]}
    for token, expert in zip(routing.token_A.tolist(), routing.expert_A().tolist()):
        if token in chosen:
            chosen[token].add(expert)
    expected = 0.5 * loss_by_loop(x_BND.flatten(0, 1), chosen, router.weight, 0.2)
    torch.testing.assert_close(routing.report.losses["contrastive"], expected)
    inputs = (x_BND, router.weight)
    actual = torch.autograd.grad(routing.report.losses["contrastive"], inputs)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, inputs))
    assert actual[0][1].abs().max() == 0 and actual[0][0].abs().max() > 0, "tokens without a class are left out"


def test_the_loss_of_orthogonal_clusters_in_closed_form():
    """Prototypes and means are equal unit vectors: each cosine is 1 with its own, 0 with the other."""
    served_R, sum_RD = torch.tensor([True, False, True]), torch.diag(torch.tensor([3.0, 0.0, 7.0]))
    loss = contrastive_loss(torch.eye(3), sum_RD, served_R, temperature=0.5)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2.0)))


def test_the_loss_is_zero_without_two_clusters_and_its_gradients_are_finite():
    for served in ([False, False], [True, False]):
        prototype_RD = torch.randn(2, 3, requires_grad=True)
        sum_RD = (torch.tensor(served)[:, None] * torch.randn(2, 3)).requires_grad_()
        loss = contrastive_loss(prototype_RD, sum_RD, torch.tensor(served), 0.07)
        assert float(loss.detach()) == 0
        assert all(torch.all(grad == 0) for grad in torch.autograd.grad(loss, (prototype_RD, sum_RD)))


def test_the_loss_is_for_training_and_may_be_off():
    x_BND = torch.randn(3, 4, 5, dtype=torch.float64)
    assert make_router().eval()(x_BND).report.losses == {}
    assert make_router(contrastive_weight=0.0)(x_BND).report.losses == {}
    assert make_router()(x_BND).report.losses["contrastive"] > 0


@pytest.mark.parametrize("top_k", [1, 3])
def test_spare_rows_change_no_output_and_no_gradient(top_k):
    """An image without a class gets the last expert's output; the others' experts learn nothing from it."""
    layer = MoEFeedForward(5, 7, RouterConfig("promoe", 4, top_k=top_k, contrastive_weight=0.0)).double()
    x_BND = torch.randn(1, 4, 5, dtype=torch.float64)
    out = layer(x_BND, context=RoutingContext(unconditional_B=torch.tensor([True]))).hidden_states
    gate, up = (x_BND @ layer.experts.w_in[3]).chunk(2, dim=-1)
    torch.testing.assert_close(out, (torch.nn.functional.silu(gate) * up) @ layer.experts.w_out[3])
    out.square().sum().backward()
    assert layer.experts.w_in.grad[:3].abs().max() == 0 and layer.experts.w_in.grad[3].abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"top_k": 4}, "top_k is 4, but of num_experts 4 the last is for images without a class; choose at most 3"),
        ({"contrastive_temperature": 0.0}, r"contrastive_temperature is 0\.0; it must be positive"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        RouterConfig("promoe", 4, **settings)
