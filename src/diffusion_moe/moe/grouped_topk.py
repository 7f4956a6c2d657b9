"""DSMoE's choice of experts and their weights as one operator a pass, with a gradient in closed form.

Shape suffixes: T tokens, E experts, K experts a token, G groups of M experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import takes_triton
from .operators import operator, run


def grouped_topk(
    logits_TE: Tensor,
    correction_E: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The K experts of highest sigmoid score plus correction in each token's best groups, and their weights.

    The score of a group is the sum of its two best experts. Among experts of equal score the Triton kernel takes that
    of the lowest index; torch does not define which.

    Args:
        logits_TE: float32 or float64.
        correction_E: correction bias, which affects the choice only.
        top_k: K.
        n_group: G.
        topk_group: groups kept for each token.
        scale: factor on the weights.
        strict: exclude experts of dropped groups. Else they score 0, as in the published models, and win against an
            expert whose correction makes its score negative.

    Returns:
        Weights, experts (int64) and sigmoids, all (T, K). The weights are the sigmoids normalised over the K (not for
        K = 1) and scaled. The sigmoids are for the backward pass; no gradient flows through them.
    """
    return GroupedTopk.apply(logits_TE, correction_E, top_k, n_group, topk_group, scale, strict)


class GroupedTopk(torch.autograd.Function):
    """`grouped_topk` with its gradient in the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        correction_E: Tensor,
        top_k: int,
        n_group: int,
        topk_group: int,
        scale: float,
        strict: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments as for `grouped_topk`."""
        chosen = run(choose_experts, logits_TE, correction_E, top_k, n_group, topk_group, scale, strict)
        weight_TK, expert_TK, score_TK = chosen
        ctx.num_experts, ctx.scale = logits_TE.shape[1], scale
        ctx.save_for_backward(expert_TK, score_TK)
        ctx.mark_non_differentiable(expert_TK, score_TK)
        return weight_TK, expert_TK, score_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight_TK: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dlogits_TE = run(grouped_topk_backward, *ctx.saved_tensors, dweight_TK, ctx.num_experts, ctx.scale)
        return dlogits_TE, None, None, None, None, None, None


@operator("grouped_topk")
def choose_experts(
    logits_TE: Tensor,
    correction_E: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grouped_topk` without a gradient."""
    if takes_triton(logits_TE, experts=logits_TE.shape[1]):
        from .kernels import router as kernel

        return kernel.grouped_topk(logits_TE, correction_E, top_k, n_group, topk_group, scale, strict)
    score_TE = logits_TE.sigmoid()
    expert_TK = _choose(score_TE + correction_E, top_k, n_group, topk_group, strict)
    score_TK = score_TE.gather(1, expert_TK)
    weight_TK = score_TK if top_k == 1 else score_TK / (score_TK.sum(dim=1, keepdim=True) + 1e-20)
    return weight_TK * scale, expert_TK, score_TK


def _choose(score_TE: Tensor, top_k: int, n_group: int, topk_group: int, strict: bool) -> Tensor:
    """The K experts of highest score in each token's best groups, (T, K)."""
    if topk_group < n_group:
        score_TGM = score_TE.unflatten(1, (n_group, -1))
        best_TG = score_TGM.topk(min(2, score_TGM.shape[2]), dim=2).values.sum(dim=2)
        kept = best_TG.topk(topk_group, dim=1, sorted=False).indices
        dropped_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, kept, False)
        score_TE = score_TGM.masked_fill(dropped_TG[:, :, None], -torch.inf if strict else 0.0).flatten(1)
    return score_TE.topk(top_k, dim=1, sorted=False).indices


@operator("grouped_topk_backward")
def grouped_topk_backward(
    expert_TK: Tensor, score_TK: Tensor, dweight_TK: Tensor, num_experts: int, scale: float
) -> Tensor:
    """The gradient of `grouped_topk` in its logits, (T, E), from the gradient of its weights."""
    if takes_triton(score_TK, experts=num_experts):
        from .kernels import router as kernel

        return kernel.grouped_topk_backward(expert_TK, score_TK, dweight_TK, num_experts, scale)
    grad_TK = dweight_TK * scale
    if expert_TK.shape[1] > 1:  # w = s / sum(s), so dL/ds = (g - sum(g s) / sum(s)) / sum(s)
        sum_T1 = score_TK.sum(dim=1, keepdim=True) + 1e-20
        grad_TK = (grad_TK - (grad_TK * score_TK).sum(dim=1, keepdim=True) / sum_T1) / sum_T1
    grad_TK = grad_TK * score_TK * (1 - score_TK)
    return grad_TK.new_zeros(len(grad_TK), num_experts).scatter_(1, expert_TK, grad_TK)


@choose_experts.register_fake
def _(
    logits_TE: Tensor,
    correction_E: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    scale: float,
    strict: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight_TK = logits_TE.new_empty(logits_TE.shape[0], top_k)
    return weight_TK, torch.empty_like(weight_TK, dtype=torch.int64), torch.empty_like(weight_TK)


@grouped_topk_backward.register_fake
def _(expert_TK: Tensor, score_TK: Tensor, dweight_TK: Tensor, num_experts: int, scale: float) -> Tensor:
    return score_TK.new_empty(score_TK.shape[0], num_experts)
