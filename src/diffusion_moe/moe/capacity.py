"""DiffMoE's capacity predictor: which tokens an expert would have chosen from the pool, told from one token alone.

Shape suffixes: P pools, M tokens of one pool, T tokens of the batch, D width, E experts, C tokens an expert takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feed_forward_autograd import WideLinear, feed_forward


class CapacityPredictor(nn.Sequential):
    """Linear, SiLU, linear: (T, D) to the logits (T, E) of being chosen (DiffMoE, capacity predictor)."""

    def __init__(self, dim: int, num_experts: int) -> None:
        linears = WideLinear(dim, dim), WideLinear(dim, num_experts)
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        super().__init__(linears[0], nn.SiLU(), linears[1])

    def forward(self, x_TD: Tensor) -> Tensor:
        first, _, last = self
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        return feed_forward(x_TD, [first], last, "silu")


def capacity_loss(logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Binary cross-entropy of the predictor against who was chosen, mean over tokens and experts (DiffMoE)."""
    return F.binary_cross_entropy_with_logits(logits_TE, chosen_TE.to(logits_TE.dtype))


def chosen_from_pool(token_EC: Tensor, num_tokens: int) -> Tensor:
    """Who was chosen, boolean, (T, E)."""
    chosen_ET = torch.zeros(len(token_EC), num_tokens, dtype=torch.bool, device=token_EC.device)
    return chosen_ET.scatter(1, token_EC, True).T


def observed_threshold(logits_TE: Tensor, capacity: int) -> Tensor:
    """Per expert, the lowest probability among its `capacity` most probable tokens, (E,)."""
    return torch.sigmoid(logits_TE.detach().topk(capacity, dim=0).values[-1])


def chosen_by_threshold(logits_PME: Tensor, gate_PME: Tensor, threshold_E: Tensor) -> Tensor:
    """Who is served at inference, boolean, (P, M, E).

    For each pool and expert: count the tokens whose probability passes the threshold, take that many by gate score.
    """
    count_PE = (torch.sigmoid(logits_PME) > threshold_E).sum(dim=1)
    rank_PME = gate_PME.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank_PME < count_PE[:, None]
