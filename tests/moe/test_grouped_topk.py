"""DSMoE's operator as torch runs it: closed forms, finite differences, and what a compiler may rely on."""

import pytest
import torch

from diffusion_moe.moe.grouped_topk import choose_experts, grouped_topk, grouped_topk_backward


def test_closed_form():
    """Scores 3/4, 1/2 and 1/4: the best two weigh 3/5 and 2/5, times the scale."""
    logits_TE = torch.logit(torch.tensor([[0.5, 0.25, 0.75]])).requires_grad_()
    weight_TK, expert_TK, score_TK = grouped_topk(logits_TE, torch.zeros(3), 2, 1, 1, 2.0)
    by_expert = torch.zeros(1, 3).scatter(1, expert_TK, weight_TK.detach())
    torch.testing.assert_close(by_expert, torch.tensor([[0.8, 0.0, 1.2]]))
    torch.testing.assert_close(score_TK.sort(1).values, torch.tensor([[0.5, 0.75]]))
    # d(2 s / (s + t)) = 2 t / (s + t)^2 ds, and ds = s (1 - s) dlogit
    (grad_TE,) = torch.autograd.grad(weight_TK[expert_TK == 0].sum(), logits_TE)
    slope = 2 / 1.25**2
    torch.testing.assert_close(grad_TE, torch.tensor([[slope * 0.75 * 0.25, 0.0, -slope * 0.5 * 0.1875]]))


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize(("groups", "topk_group", "strict"), [(1, 1, False), (3, 2, False), (3, 2, True), (6, 5, True)])
def test_gradient_against_finite_differences(top_k, groups, topk_group, strict):
    if top_k > topk_group * 6 // groups:
        top_k = topk_group * 6 // groups
    logits_TE = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    correction_E = 0.3 * torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: grouped_topk(x, correction_E, top_k, groups, topk_group, 2.5, strict)[0], logits_TE
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_opcheck(top_k):
    torch.library.opcheck(choose_experts, (torch.randn(3, 6), torch.zeros(6), top_k, 3, 2, 2.5, False))
    expert_TK, score_TK = torch.arange(3 * top_k).view(3, top_k) % 6, torch.rand(3, top_k)
    torch.library.opcheck(grouped_topk_backward, (expert_TK, score_TK, torch.randn(3, top_k), 6, 2.5))


def test_scores_that_underflow_leave_finite_numbers():
    logits_TE = torch.full((1, 4), -200.0, requires_grad=True)
    weight_TK = grouped_topk(logits_TE, torch.zeros(4), 2)[0]
    weight_TK.sum().backward()
    assert torch.equal(weight_TK, torch.zeros(1, 2)) and torch.equal(logits_TE.grad, torch.zeros(1, 4))
