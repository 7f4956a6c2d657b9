"""Load balancing of experts: a loss for the gradient, and a correction bias that moves after the optimizer step.

Shape suffixes: T tokens of the batch, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(scores_TE: Tensor, counts_E: Tensor) -> Tensor:
    """Sum over experts of f_e P_e in the batch; 1 for an even load (DeepSeekMoE eqs. 12-14).

    f_e is the load of expert e over the mean load; P_e is its mean score.

    Args:
        scores_TE: scores that sum to 1 over experts; the gradient flows through them.
        counts_E: number of assignments of each expert.
    """
    load_E = counts_E.to(scores_TE.dtype)
    return (load_E / load_E.mean() * scores_TE.mean(dim=0)).sum()


def updated_correction_bias(correction_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The next correction bias: up by `rate` below the mean load, down above it, with mean 0 (DeepSeek-V3 2.1.2)."""
    counts_E = counts_E.to(correction_E.dtype)
    moved_E = correction_E + rate * torch.sign(counts_E.mean() - counts_E)
    # Without this a common shift of all experts grows. The shift changes no choice: it raises all scores alike, and in
    # grouped top-k all group scores alike; experts of dropped groups are excluded wherever the bias moves (`strict`).
    return moved_E - moved_E.mean()
