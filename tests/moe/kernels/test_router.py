"""Scores, top-k and weights in one kernel; `tests/moe/test_routers.py` holds the torch code to the rule itself."""

import pytest
import torch

from diffusion_moe.moe import backend
from diffusion_moe.moe.grouped_topk import choose_experts, grouped_topk

SHAPES = [  # experts, groups, groups kept, experts a token
    (16, 1, 1, 2),
    (48, 1, 1, 5),
    (48, 8, 4, 5),
    (6, 3, 2, 2),
    (6, 6, 3, 3),
    (12, 4, 2, 6),
    (7, 1, 1, 7),
    (5, 1, 1, 1),
]


def dense(expert_TK, value_TK, num_experts):
    """As a matrix (T, E): the order of a token's experts does not matter."""
    return torch.zeros(len(expert_TK), num_experts).scatter(1, expert_TK, value_TK)


@pytest.mark.parametrize(("experts", "groups", "topk_group", "top_k"), SHAPES)
@pytest.mark.parametrize("correction", [0.0, 0.5, -0.9])
def test_equals_torch_in_choice_weights_and_gradient(both, experts, groups, topk_group, top_k, correction):
    """Where no scores are equal. A negative correction makes scores of kept groups lose against dropped ones' zeros,
    which are equal: with it, the group limit is strict."""
    logits_TE = torch.randn(37, experts, requires_grad=True)
    correction_E, direction_TE = correction * torch.rand(experts), torch.randn(37, experts)

    def run():
        weight_TK, expert_TK, score_TK = grouped_topk(
            logits_TE, correction_E, top_k, groups, topk_group, 2.5, correction < 0
        )
        (grad_TE,) = torch.autograd.grad((weight_TK * direction_TE.gather(1, expert_TK)).sum(), logits_TE)
        matrices = [dense(expert_TK, x.detach(), experts) for x in (torch.ones_like(weight_TK), weight_TK, score_TK)]
        return *matrices, grad_TE

    kernel, oracle = both(run)
    assert torch.equal(kernel[0], oracle[0]) and torch.all(kernel[0].sum(1) == top_k)
    torch.testing.assert_close(kernel[1:], oracle[1:], rtol=1e-5, atol=1e-6)
    assert oracle[3].abs().max() > 1e-3 or top_k == experts == 1


def test_a_published_dropped_group_scores_zero():
    """Kept: experts 0 and 1, corrected scores 0.4 and -0.3; the second choice is a dropped one's 0."""
    logits_TE = torch.logit(torch.tensor([[0.9, 0.2, 0.3, 0.25]]))
    correction_E = torch.tensor([-0.5, -0.5, -0.6, -0.6])
    with backend.use("triton"):
        published = grouped_topk(logits_TE, correction_E, 2, 2, 1, 1.0, False)
        strict = grouped_topk(logits_TE, correction_E, 2, 2, 1, 1.0, True)
    assert published[1].tolist() == [[0, 2]] and strict[1].tolist() == [[0, 1]]
    torch.testing.assert_close(published[0], torch.tensor([[0.9, 0.3]]) / 1.2)
    torch.testing.assert_close(strict[0], torch.tensor([[0.9, 0.2]]) / 1.1)


def test_equal_scores_go_to_the_lowest_number():
    with backend.use("triton"):
        assert grouped_topk(torch.zeros(1, 6), torch.zeros(6), 3)[1].tolist() == [[0, 1, 2]]
        assert grouped_topk(torch.full((1, 6), 99.0), torch.zeros(6), 2, 3, 2, 1.0, True)[1].tolist() == [[0, 1]]
        later = torch.tensor([[0.0, 0, 1, 1, 1, 1]])
        assert grouped_topk(later, torch.zeros(6), 2, 3, 1)[1].tolist() == [[2, 3]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("groups", [1, 3])
def test_experts_stay_in_range_and_differ_whatever_the_logits(value, groups):
    logits_TE = torch.randn(4, 6)
    logits_TE[1], logits_TE[2, 3] = value, value
    for correction_E in (torch.zeros(6), torch.full((6,), value)):
        with backend.use("triton"):
            expert_TK = grouped_topk(logits_TE, correction_E, 2, groups, max(1, groups - 1), 1.0, True)[1]
        assert torch.all((expert_TK >= 0) & (expert_TK < 6)) and torch.all(expert_TK[:, 0] != expert_TK[:, 1])
    if value != value:
        assert torch.all((expert_TK == 0).any(1)), "NaN counts as the highest, and the lowest number is taken first"


def test_no_tokens_and_the_operators_promises():
    logits_TE = torch.randn(3, 6, requires_grad=True)
    with backend.use("triton"):
        torch.library.opcheck(choose_experts, (logits_TE.detach(), torch.zeros(6), 2, 3, 2, 2.5, False))
        assert [x.shape for x in grouped_topk(logits_TE[:0], torch.zeros(6), 2)] == [(0, 2)] * 3
        (grad_TE,) = torch.autograd.grad(grouped_topk(logits_TE[:0], torch.zeros(6), 2)[0].sum(), logits_TE)
    assert torch.equal(grad_TE, torch.zeros(3, 6))
