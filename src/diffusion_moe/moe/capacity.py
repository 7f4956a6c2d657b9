"""DiffMoE's capacity predictor: predicts from one token alone which experts would choose it from the pool.

Shape suffixes: P pools, M tokens of one pool, T tokens of the batch, D width, E experts, C tokens an expert takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feed_forward import CastingLinear, feed_forward


class CapacityPredictor(nn.Sequential):
    """Linear, SiLU, linear: (T, D) to the logits (T, E) of being chosen by each expert (DiffMoE)."""

    def __init__(self, dim: int, num_experts: int) -> None:
        first, last = CastingLinear(dim, dim), CastingLinear(dim, num_experts)
        for linear in (first, last):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        super().__init__(first, nn.SiLU(), last)

    def forward(self, x_TD: Tensor) -> Tensor:
        first, _, last = self
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        return feed_forward(x_TD, [first], last, "silu")


def capacity_loss(logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Binary cross-entropy of the predictor against the choices, mean over tokens and experts (DiffMoE)."""
    return F.binary_cross_entropy_with_logits(logits_TE, chosen_TE.to(logits_TE.dtype))


def chosen_from_pool(token_EC: Tensor, num_tokens: int) -> Tensor:
    """The choices as a boolean mask, (T, E)."""
    chosen_ET = torch.zeros(len(token_EC), num_tokens, dtype=torch.bool, device=token_EC.device)
    return chosen_ET.scatter(1, token_EC, True).T


def observed_threshold(logits_TE: Tensor, capacity: int) -> Tensor:
    """The lowest probability among each expert's `capacity` most probable tokens, (E,)."""
    return torch.sigmoid(logits_TE.detach().topk(capacity, dim=0).values[-1])


def chosen_by_threshold(logits_PME: Tensor, gate_PME: Tensor, threshold_E: Tensor) -> Tensor:
    """The choices at inference as a boolean mask, (P, M, E).

    Each expert counts the tokens of a pool whose probability is above its threshold, and takes that many by gate score.
    """
    count_PE = (torch.sigmoid(logits_PME) > threshold_E).sum(dim=1)
    rank_PME = gate_PME.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank_PME < count_PE[:, None]
