"""Each routing rule against a plain reimplementation, token by token."""

import copy
import math

import numpy as np
import pytest
import torch
from router_context import with_context

from diffusion_moe.moe import ROUTERS, Router, RouterConfig, register_router
from diffusion_moe.routing_rules import RULES

KINDS = [kind for kind, rule in RULES.items() if rule.parameter_shapes(RouterConfig(kind, 8), 6)]
"""All rules that learn something."""


def make_router(kind, dim=6, num_experts=8, **settings):
    """A router whose weights are large enough that scores differ well."""
    router = ROUTERS[kind](dim, RouterConfig(kind, num_experts, **settings))
    with torch.no_grad():
        router.weight.normal_()
    return with_context(router)


def softmax_scores(router, x_BND) -> np.ndarray:
    logits = x_BND.double().numpy() @ router.weight.detach().double().numpy().T
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def expect(actual_TE, expected_TE):
    """Same choices and same weights."""
    torch.testing.assert_close(actual_TE.double(), torch.from_numpy(expected_TE), rtol=1e-5, atol=1e-7)
    assert np.array_equal(actual_TE.numpy() != 0, expected_TE != 0)


# Token choice


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_token_choice_takes_the_best_and_does_not_renormalise(gates, top_k):
    router, x_BND = make_router("tc", top_k=top_k), torch.randn(2, 5, 6)
    scores_TE = softmax_scores(router, x_BND).reshape(10, 8)
    expected_TE = np.where(scores_TE >= np.sort(scores_TE, axis=1)[:, [-top_k]], scores_TE, 0)
    expect(gates(router(x_BND), 10), expected_TE)


def test_token_choice_correction_changes_the_choice_and_not_the_weights(gates):
    router, x_BND = make_router("tc", top_k=2, balance="bias"), torch.randn(2, 5, 6)
    router.e_score_correction_bias[3] = 10.0
    gate_TE = gates(router(x_BND), 10)
    scores_TE = torch.from_numpy(softmax_scores(router, x_BND).reshape(10, 8)).float()
    assert torch.all(gate_TE[:, 3] > 0)
    torch.testing.assert_close(gate_TE[gate_TE > 0], scores_TE[gate_TE > 0])


# DSMoE


def dsmoe_by_hand(x, weight, correction, top_k, groups, topk_group, scale) -> list[float]:
    """One token's weights in plain Python."""
    scores = [1 / (1 + math.exp(-sum(a * b for a, b in zip(x, row)))) for row in weight]
    corrected = [s + c for s, c in zip(scores, correction)]
    size = len(scores) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    rating = [sum(sorted((corrected[e] for e in m), reverse=True)[:2]) for m in members]
    kept = sorted(range(groups), key=lambda g: -rating[g])[:topk_group]
    chosen = sorted((e for g in kept for e in members[g]), key=lambda e: -corrected[e])[:top_k]
    total = sum(scores[e] for e in chosen)
    return [scale * s / total if e in chosen else 0.0 for e, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("top_k", "groups", "topk_group"), [(2, 1, 1), (3, 4, 2), (2, 2, 1), (2, 4, 1), (3, 8, 4), (8, 2, 2)]
)
@pytest.mark.parametrize("corrected", [False, True])
def test_dsmoe_equals_the_rule_in_plain_python(gates, top_k, groups, topk_group, corrected):
    router = make_router("dsmoe", top_k=top_k, n_group=groups, topk_group=topk_group, routed_scaling_factor=2.5)
    if corrected:
        router.e_score_correction_bias.normal_()
    x_BND = torch.randn(3, 7, 6)
    settings = (router.weight.tolist(), router.e_score_correction_bias.tolist(), top_k, groups, topk_group, 2.5)
    expected_TE = np.array([dsmoe_by_hand(x, *settings) for x in x_BND.flatten(0, 1).tolist()])
    gate_TE = gates(router(x_BND), 21)
    expect(gate_TE, expected_TE)
    torch.testing.assert_close(gate_TE.sum(1), torch.full((21,), 2.5))


def test_dsmoe_groups_change_the_choice(gates):
    """The best two experts lie in two groups; the better group has a good pair, so its second best is taken."""
    router = ROUTERS["dsmoe"](4, RouterConfig("dsmoe", 4, top_k=2, n_group=2, topk_group=1))
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    gate_E = gates(router(torch.tensor([[[3.0, -9.0, 2.0, 1.0]]])), 1)[0]  # pairs: 0.95 + 0.00, 0.88 + 0.73
    a, b = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    torch.testing.assert_close(gate_E, torch.tensor([0, 0, a / (a + b), b / (a + b)]))


def test_one_dsmoe_expert_a_token_keeps_its_score_as_weight():
    """Normalised it would always weigh 1, and the router would learn nothing."""
    router, x_BND = make_router("dsmoe", top_k=1, routed_scaling_factor=2.5), torch.randn(2, 5, 6)
    routing = router(x_BND)
    best_TE = torch.sigmoid(x_BND.flatten(0, 1) @ router.weight.T)
    weight_T = torch.empty(10).index_copy(0, routing.token_A, routing.weight_A)
    torch.testing.assert_close(weight_T, 2.5 * best_TE.max(1).values)
    routing.weight_A.sum().backward()
    assert router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_experts_of_dropped_groups_score_zero_as_published_or_are_out(gates, balance):
    """With negative corrected scores in the kept group, 0 wins where the bias is the checkpoint's."""
    settings = {"top_k": 4, "n_group": 2, "topk_group": 1, "balance": balance}
    router, x_BND = make_router("dsmoe", **settings), torch.randn(5, 20, 6)
    router.e_score_correction_bias.fill_(-0.5)
    corrected_TE = torch.sigmoid(x_BND.flatten(0, 1) @ router.weight.T) - 0.5
    rating_TG = corrected_TE.unflatten(1, (2, 4)).topk(2, dim=-1).values.sum(-1)
    kept_TE = (torch.arange(8) // 4) == rating_TG.argmax(1)[:, None]
    chosen_TE = gates(router(x_BND), 100) > 0
    if balance == "bias":
        assert torch.equal(chosen_TE, kept_TE)
    else:
        assert torch.equal(chosen_TE & kept_TE, kept_TE & (corrected_TE > 0))
        assert (chosen_TE & ~kept_TE).any() and (chosen_TE.sum(1) == 4).all()


# Expert choice


@pytest.mark.parametrize(
    ("num_tokens", "capacity", "expert_capacity"),
    [(16, 1, 2), (23, 1, 2), (16, 3, 6), (5, 1, 1), (16, 8, 16)],
)
def test_expert_choice_takes_the_best_tokens_of_each_image(gates, num_tokens, capacity, expert_capacity):
    router, x_BND = make_router("ec", capacity=capacity), torch.randn(3, num_tokens, 6)
    scores_BNE = softmax_scores(router, x_BND)
    kth_BE = np.sort(scores_BNE, axis=1)[:, -expert_capacity]
    expected_BNE = np.where(scores_BNE >= kth_BE[:, None], scores_BNE, 0)
    assert np.all((expected_BNE != 0).sum(1) == expert_capacity)
    routing = router(x_BND)
    expect(gates(routing, 3 * num_tokens), expected_BNE.reshape(-1, 8))
    assert routing.report.counts_E.tolist() == [3 * expert_capacity] * 8


@pytest.mark.parametrize("training", [True, False])
def test_expert_choice_of_an_image_does_not_depend_on_the_others(gates, training):
    router, x_BND = make_router("ec", capacity=2.0).train(training), torch.randn(3, 16, 6)
    together = gates(router(x_BND), 48)
    for b in range(3):
        torch.testing.assert_close(together[16 * b : 16 * (b + 1)], gates(router(x_BND[b : b + 1]), 16))


# DiffMoE


def batch_pool(num_experts=4, **settings):
    router = make_router("diffmoe", num_experts=num_experts, **settings)
    for p in router.predictor.parameters():
        torch.nn.init.normal_(p)
    router.threshold.copy_(torch.linspace(0.3, 0.7, num_experts))
    return router


@pytest.mark.parametrize(("capacity", "expert_capacity"), [(1.0, 5), (2.0, 10), (0.1, 1)])
def test_diffmoe_trains_on_the_best_tokens_of_the_whole_batch(gates, capacity, expert_capacity):
    router, x_BND = batch_pool(capacity=capacity), torch.randn(3, 7, 6)  # int(21 / 4) = 5
    scores_TE = softmax_scores(router, x_BND).reshape(21, 4)
    expected_TE = np.where(scores_TE >= np.sort(scores_TE, axis=0)[-expert_capacity], scores_TE, 0)
    routing = router(x_BND)
    expect(gates(routing, 21), expected_TE)
    probability_TE = torch.sigmoid(router.predictor(x_BND.flatten(0, 1))).detach()
    loss = -torch.where(torch.from_numpy(expected_TE) > 0, probability_TE.log(), (1 - probability_TE).log()).mean()
    torch.testing.assert_close(routing.report.losses["capacity"], loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        routing.report.threshold_E, probability_TE.sort(0, descending=True).values[expert_capacity - 1]
    )


def test_diffmoe_weighs_its_loss():
    router, x_BND = batch_pool(), torch.randn(2, 8, 6)
    heavy = copy.deepcopy(router)
    heavy.config = RouterConfig("diffmoe", 4, capacity_loss_weight=3.0)
    torch.testing.assert_close(heavy(x_BND).report.losses["capacity"], 3 * router(x_BND).report.losses["capacity"])


def test_diffmoe_predictors_loss_sends_no_gradient_to_the_layers_input():
    router, x_BND = batch_pool(), torch.randn(2, 8, 6, requires_grad=True)
    routing = router(x_BND)
    loss, predictor = routing.report.losses["capacity"], list(router.predictor.parameters())
    grads = torch.autograd.grad(loss, [x_BND, router.weight, *predictor], allow_unused=True, retain_graph=True)
    assert grads[0] is None and grads[1] is None
    assert all(g.abs().max() > 0 for g in grads[2:])
    # The gate's gradient does reach the input, and never the predictor.
    grads = torch.autograd.grad(routing.weight_A.square().sum(), [x_BND, router.weight, *predictor], allow_unused=True)
    assert grads[0].abs().max() > 0 and grads[1].abs().max() > 0 and all(g is None for g in grads[2:])


def inference_by_hand(router, pools: list[torch.Tensor]) -> np.ndarray:
    """Per pool and expert: count who passes the threshold, take that many by gate."""
    rows = []
    for x_MD in pools:
        scores = softmax_scores(router, x_MD)
        probability = torch.sigmoid(router.predictor(x_MD)).detach()
        gate = np.zeros_like(scores)
        for e in range(scores.shape[1]):
            count = int((probability[:, e] > router.threshold[e]).sum())
            for m in sorted(range(len(scores)), key=lambda m, s=scores[:, e]: -s[m])[:count]:
                gate[m, e] = scores[m, e]
        rows.append(gate)
    return np.concatenate(rows)


@pytest.mark.parametrize("pool", ["image", "batch"])
def test_diffmoe_inference_equals_the_rule_in_a_plain_loop(gates, pool):
    router, x_BND = batch_pool(inference_pool=pool).eval(), torch.randn(3, 9, 6)
    pools = list(x_BND) if pool == "image" else [x_BND.flatten(0, 1)]
    expected_TE = inference_by_hand(router, pools)
    assert 0 < (expected_TE != 0).sum() < 27 * 4
    routing = router(x_BND)
    expect(gates(routing, 27), expected_TE)
    assert routing.report.losses == {} and routing.report.threshold_E is None
    assert np.array_equal(routing.report.counts_E.numpy(), (expected_TE != 0).sum(0))


def test_diffmoe_image_pool_does_not_depend_on_the_rest_of_the_batch(gates):
    router, x_BND = batch_pool(inference_pool="image").eval(), torch.randn(3, 9, 6)
    together = gates(router(x_BND), 27)
    for b in range(3):
        torch.testing.assert_close(together[9 * b : 9 * (b + 1)], gates(router(x_BND[b : b + 1]), 9))


@pytest.mark.parametrize("pool", ["image", "batch"])
def test_diffmoe_batch_pool_gives_one_images_place_to_another(gates, pool):
    """Image 0's token passes the threshold but has the lower gate; image 1's does not pass and has the higher gate."""
    router = ROUTERS["diffmoe"](2, RouterConfig("diffmoe", 2, top_k=1, inference_pool=pool)).eval()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # gate of expert 0: sigmoid of feature 0
        router.predictor[0].weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        router.predictor[2].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # expert 0: silu of feature 1
        router.predictor[2].bias.copy_(torch.tensor([0.0, -10.0]))  # expert 1: nobody
    router.threshold.fill_(0.5)
    x_BND = torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]])
    low, high = 1 / (1 + math.e), 1 / (1 + 1 / math.e)
    torch.testing.assert_close(gates(router(x_BND[:1]), 1), torch.tensor([[low, 0.0]]))
    expected = [[low, 0.0], [0.0, 0.0]] if pool == "image" else [[0.0, 0.0], [high, 0.0]]
    torch.testing.assert_close(gates(router(x_BND), 2), torch.tensor(expected))


# What all rules share


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_permuted_tokens_are_routed_alike(gates, kind, training):
    """Within images; for the batch pool in training, over the whole batch."""
    router, x_BND = make_router(kind).train(training), torch.randn(2, 16, 6)
    if kind == "diffmoe":
        router.threshold.fill_(0.5)
    order = torch.randperm(16)
    before, after = gates(router(x_BND), 32), gates(router(x_BND[:, order]), 32)
    torch.testing.assert_close(after, before.view(2, 16, -1)[:, order].flatten(0, 1))
    if kind not in ("ec", "nucleus"):
        order = torch.randperm(32) if kind != "diffmoe" or training else torch.arange(32)
        after = gates(router(x_BND.flatten(0, 1)[order].view_as(x_BND)), 32)
        torch.testing.assert_close(after, before[order])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{"kind": k} for k in KINDS] + [{"kind": "tc", "balance": "aux"}], ids=str)
def test_autocast_changes_nothing_in_a_router(settings, training):
    router, x_BND = make_router(**settings).train(training), torch.randn(2, 16, 6)
    if settings["kind"] == "diffmoe":
        router.threshold.fill_(0.5)
    expected = router(x_BND)
    with torch.autocast("cpu", torch.bfloat16):
        actual = router(x_BND)
        rounded = router(x_BND.bfloat16())
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(rounded, router(x_BND.bfloat16().float()), rtol=0, atol=0)
    assert expected.weight_A.dtype == rounded.weight_A.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"kind": k} for k in KINDS] + [{"kind": k, "balance": b} for k in ("tc", "dsmoe") for b in ("aux", "bias")],
    ids=str,
)
def test_forward_changes_nothing_in_a_router(settings, training):
    router = make_router(**settings).train(training)
    before = copy.deepcopy(router.state_dict())
    buffers = {name: b.clone() for name, b in router.named_buffers()}
    routing = router(torch.randn(2, 16, 6))
    (routing.weight_A.sum() + sum(routing.report.losses.values())).backward()
    assert all(torch.equal(b, buffers[name]) for name, b in router.named_buffers())
    after = router.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["tc", "dsmoe"])
def test_auxiliary_loss_is_weighted_balance_loss_and_for_training_only(kind):
    router, x_BND = make_router(kind, balance="aux", balance_weight=0.5), torch.randn(2, 16, 6)
    report = router(x_BND).report
    scores = softmax_scores(router, x_BND).reshape(32, 8)
    if kind == "dsmoe":  # DeepSeek-V3: the sigmoids' shares
        logits = x_BND.double().numpy().reshape(32, 6) @ router.weight.detach().double().numpy().T
        scores = 1 / (1 + np.exp(-logits))
        scores = scores / scores.sum(1, keepdims=True)
    f_E = report.counts_E.numpy() / 64 * 8
    assert float(report.losses["balance"]) == pytest.approx(0.5 * float((f_E * scores.mean(0)).sum()), rel=1e-5)
    assert torch.autograd.grad(report.losses["balance"], router.weight)[0].abs().max() > 0
    assert router.eval()(x_BND).report.losses == {}
    assert make_router(kind)(x_BND).report.losses == {}


def test_gradient_of_the_weights_reaches_the_gate():
    for kind in KINDS:
        router, x_BND = make_router(kind), torch.randn(2, 16, 6, requires_grad=True)
        router(x_BND).weight_A.square().sum().backward()
        assert router.weight.grad.abs().max() > 0 and x_BND.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "std"),
    [
        *((kind, 0.006) for kind in ("ec", "diffmoe", "nucleus")),
        ("dsmoe", (2 / 512) ** 0.5),
        ("tc", (1 / 3 / 512) ** 0.5),
        ("promoe", 0.02),
    ],
)
def test_initial_gates(kind, std):
    """Normal 0.006, or 0.02 (ProMoE), Kaiming-normal (DSMoE), a linear layer's (TC); states start at zero."""
    router = ROUTERS[kind](512, RouterConfig(kind, 64))
    assert float(router.weight.std()) == pytest.approx(std, rel=0.03)
    assert all(torch.all(buffer == 0) for buffer in router.buffers())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "best"}, "'best'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 9}, "top_k is 9"),
        ({"kind": "ec", "capacity": 0.0}, r"capacity is 0\.0"),
        ({"kind": "diffmoe", "capacity": 8.5}, r"capacity is 8\.5"),
        ({"n_group": 3}, "n_group 3"),
        ({"n_group": 0}, "n_group 0"),
        ({"n_group": 2, "topk_group": 3}, "topk_group is 3"),
        ({"n_group": 2, "topk_group": 0}, "topk_group is 0"),
        ({"n_group": 4, "topk_group": 1, "top_k": 3}, "top_k is 3, but topk_group 1 leaves 2"),
        ({"balance": "magic"}, "'magic'"),
        ({"kind": "diffmoe", "inference_pool": "world"}, "'world'"),
        ({"num_experts": 0, "top_k": 0}, "0"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        RouterConfig(**{"kind": "dsmoe", "num_experts": 8, **settings})


def test_settings_that_a_rule_does_not_read_are_not_checked():
    assert RouterConfig("ec", 4, top_k=9, balance="magic").top_k == 9
    assert RouterConfig("tc", 4, capacity=0.0, n_group=3).n_group == 3


@pytest.mark.parametrize("name", ["dense", *RULES])
def test_a_taken_name_is_refused(name):
    with pytest.raises(ValueError, match=f"router '{name}' exists already"):
        register_router(name, ROUTERS["tc"])


def test_a_class_without_the_facts_of_a_rule_is_refused():
    class Bare(Router):
        pass

    with pytest.raises(ValueError, match="Bare does not define experts_per_token"):
        register_router("bare", Bare)
    assert "bare" not in ROUTERS
