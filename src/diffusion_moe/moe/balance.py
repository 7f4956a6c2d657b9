"""Load balancing of experts: a loss for the gradient, and a correction bias that moves after the optimizer step.

Shape suffixes: T tokens of the batch, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """Sum over experts of f_e P_e in the batch; 1 for an even load (DeepSeekMoE eqs. 12-14).

    f_e is the share of the assignments that expert e got, times E; P_e is its mean score.

    Args:
        scores_TE: scores that sum to 1 over experts; the gradient flows through them.
        expert_TK: the chosen experts.
    """
    E = scores_TE.shape[1]
    chosen_A = expert_TK.flatten()
    ones_A = torch.ones_like(chosen_A, dtype=scores_TE.dtype)
    f_E = scores_TE.new_zeros(E).scatter_add(0, chosen_A, ones_A) * (E / chosen_A.numel())
    return (f_E * scores_TE.mean(dim=0)).sum()


def updated_correction_bias(correction_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The next correction bias: up by `rate` below the mean load, down above it, with mean 0 (DeepSeek-V3 2.1.2)."""
    counts_E = counts_E.to(correction_E.dtype)
    moved_E = correction_E + rate * torch.sign(counts_E.mean() - counts_E)
    # Without this a common shift of all experts grows. The shift changes no choice: it raises all scores alike, and in
    # grouped top-k all group scores alike; experts of dropped groups are excluded wherever the bias moves (`strict`).
    return moved_E - moved_E.mean()
