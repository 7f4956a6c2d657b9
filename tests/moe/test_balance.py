"""The balance loss and the moves of the routing state, in closed form."""

import pytest
import torch

from diffusion_moe.moe import ROUTERS, MoEFeedForward, RouterConfig, RoutingReport, routers_of, update_routing_state
from diffusion_moe.moe.balance import balance_loss, updated_correction_bias


def test_balance_loss_is_one_for_an_even_load():
    counts_E = torch.tensor([2, 2, 2, 2])
    assert balance_loss(torch.full((4, 4), 0.25), counts_E) == 1
    # With an even load every score distribution gives 1.
    torch.testing.assert_close(balance_loss(torch.rand(4, 4).softmax(1), counts_E), torch.tensor(1.0))


def test_balance_loss_by_hand():
    """Both tokens on expert 0: f = (2, 0), P = (0.75, 0.25), loss 1.5; the gradient of a score is f / T."""
    scores_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4]], requires_grad=True)
    loss = balance_loss(scores_TE, torch.tensor([2, 0]))
    torch.testing.assert_close(loss, torch.tensor(1.5))
    torch.testing.assert_close(torch.autograd.grad(loss, scores_TE)[0], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_balance_loss_with_two_experts_a_token_by_hand():
    """Assignments (3, 2, 1) of 6, E = 3: f = (1.5, 1, 0.5); P = (0.4, 0.35, 0.25): 0.6 + 0.35 + 0.125."""
    scores_TE = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.3, 0.35, 0.35]])
    loss = balance_loss(scores_TE, torch.tensor([3, 2, 1]))
    torch.testing.assert_close(loss, torch.tensor(1.075))


def test_correction_moves_by_rate_times_sign_and_is_centred():
    """The mean load is 4: (0.5 - 0.1, 0, -0.5 + 0.1, 0.2 + 0.1) less their mean 0.075."""
    moved = updated_correction_bias(torch.tensor([0.5, 0.0, -0.5, 0.2]), torch.tensor([9, 4, 1, 2]), 0.1)
    torch.testing.assert_close(moved, torch.tensor([0.325, -0.075, -0.475, 0.225]))


def test_a_drift_of_the_correction_is_gone_after_one_update():
    moved = updated_correction_bias(torch.tensor([1.0, 2.5, 1.75, 1.75]), torch.tensor([3, 3, 3, 3]), 0.1)
    assert moved.tolist() == [-0.75, 0.75, 0.0, 0.0]


def test_the_mean_of_the_correction_stays_zero():
    correction_E, drifting_E = torch.zeros(16), torch.zeros(16)
    for _ in range(500):
        counts_E = torch.distributions.Exponential(1.0).sample((16,)).mul(100).long()
        correction_E = updated_correction_bias(correction_E, counts_E, 0.01)
        drifting_E += 0.01 * torch.sign(counts_E.float().mean() - counts_E)
        assert abs(float(correction_E.mean())) < 1e-6
    assert float(drifting_E.mean()) > 0.5  # most loads are below their mean
    torch.testing.assert_close(correction_E, drifting_E - drifting_E.mean(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "groups"), [("tc", {}), ("dsmoe", {}), ("dsmoe", {"n_group": 4, "topk_group": 2})], ids=str
)
def test_centring_changes_no_choice(kind, groups):
    """Two routers of equal weights in float64, of which one begins shifted and is moved without centring."""
    config = RouterConfig(kind, 8, top_k=2, balance="bias", balance_rate=0.02, **groups)
    centred, drifting = (ROUTERS[kind](6, config).double() for _ in range(2))
    with torch.no_grad():
        centred.weight.normal_()
        centred.weight[:, 0] = torch.tensor([4.0, 2.0, *[0.0] * 6])
    drifting.load_state_dict(centred.state_dict())
    drifting.e_score_correction_bias += 1.75
    for _ in range(50):
        x_BND = torch.randn(2, 32, 6, dtype=torch.float64).abs()
        routings = [router(x_BND) for router in (centred, drifting)]
        assert all(torch.equal(*pair) for pair in zip(*([r.token_A, r.expert_A(), r.weight_A] for r in routings)))
        counts_E = routings[0].report.counts_E.double()
        update_routing_state([centred], [routings[0].report])
        drifting.e_score_correction_bias += 0.02 * torch.sign(counts_E.mean() - counts_E)
    assert (
        abs(float(centred.e_score_correction_bias.mean())) < 1e-12
        and float(drifting.e_score_correction_bias.mean()) > 1
    )


@pytest.mark.parametrize("kind", ["tc", "dsmoe"])
def test_update_moves_the_correction_only_with_balance_bias(kind):
    report = RoutingReport(torch.tensor([3, 1]), {})
    router = ROUTERS[kind](4, RouterConfig(kind, 2, balance="bias", balance_rate=0.25))
    for _ in range(2):
        update_routing_state([router], [report])
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.5]
    still = ROUTERS[kind](4, RouterConfig(kind, 2, balance="none"))
    update_routing_state([still], [report])
    assert still.e_score_correction_bias is None or still.e_score_correction_bias.tolist() == [0, 0]


def test_update_moves_the_threshold_by_its_moving_average():
    router = ROUTERS["diffmoe"](4, RouterConfig("diffmoe", 2, threshold_decay=0.75))
    router.threshold.copy_(torch.tensor([0.4, 0.8]))
    update_routing_state([router], [RoutingReport(torch.tensor([1, 1]), {}, torch.tensor([0.8, 0.4]))])
    torch.testing.assert_close(router.threshold, torch.tensor([0.5, 0.7]))  # 0.75 old + 0.25 new


def test_every_router_gets_its_own_report():
    model = torch.nn.Sequential(
        *(MoEFeedForward(8, 8, RouterConfig("tc", 2, top_k=1, balance="bias", balance_rate=1.0)) for _ in range(2))
    )
    routers = routers_of(model)
    assert [id(router) for router in routers] == [id(layer.router) for layer in model]
    update_routing_state(routers, [RoutingReport(torch.tensor(c), {}) for c in ([2, 0], [0, 2])])
    assert [router.e_score_correction_bias.tolist() for router in routers] == [[-1, 1], [1, -1]]


@pytest.mark.parametrize("kind", ["tc", "dsmoe"])
def test_bias_evens_out_a_skewed_load(kind):
    """A constant feature makes every token prefer expert 0; the correction takes the load down to even."""
    router = ROUTERS[kind](8, RouterConfig(kind, 4, top_k=1, balance="bias", balance_rate=0.01))
    with torch.no_grad():
        router.weight.normal_()
        router.weight[:, 0] = torch.tensor([4.0, 0.0, 0.0, 0.0])
    x_BND = torch.randn(2, 128, 8)
    x_BND[..., 0] = 1
    start = router(x_BND).report.counts_E
    for _ in range(100):
        update_routing_state([router], [router(x_BND).report])
    end = router(x_BND).report.counts_E
    assert start.sum() == end.sum() == 256
    assert start[0] > 2 * 64 and start.min() < 0.5 * 64
    assert end.max() < 1.1 * 64 and end.min() > 0.9 * 64
