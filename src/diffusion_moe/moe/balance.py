"""Keeping experts evenly loaded: a loss for the gradient, and a state that moves after the optimizer step.

Shape suffixes: T tokens of the batch, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .routing import RoutingReport

if TYPE_CHECKING:
    from .routers import Router


def balance_loss(scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """sum_e f_e P_e over the tokens of the batch; 1 for an even load (DeepSeekMoE eqs. 12-14).

    f_e is the share of the assignments that expert e got, times E; P_e its mean score.

    Args:
        scores_TE: scores that sum to 1 over experts; the gradient flows here. expert_TK: the experts chosen.
    """
    E = scores_TE.shape[1]
    chosen_A = expert_TK.flatten()
    ones_A = torch.ones_like(chosen_A, dtype=scores_TE.dtype)
    f_E = scores_TE.new_zeros(E).scatter_add(0, chosen_A, ones_A) * (E / chosen_A.numel())
    return (f_E * scores_TE.mean(dim=0)).sum()


def updated_correction_bias(correction_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The next correction bias, of mean zero: up by `rate` below the mean load, down above it (DeepSeek-V3, 2.1.2)."""
    counts_E = counts_E.to(correction_E.dtype)
    moved_E = correction_E + rate * torch.sign(counts_E.mean() - counts_E)
    # A shift of all experts would grow otherwise. It changes no choice: it raises all scores alike, and in grouped
    # top-k all sums of groups alike, where dropped groups are out entirely (`strict`) wherever the bias moves.
    return moved_E - moved_E.mean()


@torch.no_grad()
def update_routing_state(routers: Sequence[Router], reports: Sequence[RoutingReport]) -> None:
    """Move every router's state by what the step learned. Call it once, after the optimizer step.

    Args:
        routers: the model's routers, in the order of the reports (`moe.routers_of`). reports: of the whole step, merged
            over micro-batches (`moe.merge_reports`).
    """
    assert len(routers) == len(reports)
    for router, report in zip(routers, reports):
        router.update_state(report)
