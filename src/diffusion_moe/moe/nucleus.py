"""Nucleus-Image's routing rule: expert choice by token and time (arXiv 2604.12163).

Formulas are those of its inference code in diffusers (transformer_nucleusmoe_image.py, `NucleusMoELayer`). Shape
suffixes: B images, N tokens of one image, D width, E experts, C tokens an expert takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..routing_rules import NucleusRule
from .precision import exact_linear
from .router import Router, RouterConfig
from .routing import Routing, route_by_expert

LEAST_SUM = 1e-12
"""Added to the sum that a token's weights are divided by."""


class NucleusRouter(NucleusRule, Router):
    """Each expert takes the C best tokens of each image by softmax score; the weights of a token are its scores,
    normalised over the experts that took it and scaled.

    The router looks at the token before adaLN modulates it, joined with the embedding of the image's time, so that the
    time cannot drown the content. A token that no expert took gets the shared expert alone.

    The published code is for inference and leaves open how the router was initialised; here as DiffMoE's.
    """

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config)
        self.time_weight = nn.Parameter(torch.empty(config.num_experts, dim))
        nn.init.normal_(self.time_weight, std=0.006)

    def route(self, x_BND: Tensor, logits_BNE: Tensor, time_embedding_BD: Tensor | None = None) -> Routing:
        """Route by the scores of the joined vectors: the sum of those of a token and of its image's time."""
        assert time_embedding_BD is not None
        time_BE = exact_linear(time_embedding_BD.to(x_BND.dtype), self.time_weight.to(x_BND.dtype))
        B, N, _ = logits_BNE.shape
        gate_BEN = (logits_BNE + time_BE[:, None]).softmax(dim=-1).transpose(1, 2)
        capacity = self.expert_capacity(self.settings, N)
        token_BEC = gate_BEN.detach().topk(capacity, dim=-1, sorted=False).indices
        taken_BEN = torch.zeros_like(gate_BEN, dtype=torch.bool).scatter(-1, token_BEC, True)
        sum_BN = torch.where(taken_BEN, gate_BEN, 0.0).sum(1)
        sum_BEC = sum_BN[:, None].expand_as(gate_BEN).gather(-1, token_BEC)
        weight_BEC = self.config.routed_scaling_factor * (gate_BEN.gather(-1, token_BEC) / (sum_BEC + LEAST_SUM))
        token_BEC = token_BEC + N * torch.arange(B, device=token_BEC.device)[:, None, None]
        return route_by_expert(token_BEC.transpose(0, 1).flatten(1), weight_BEC.transpose(0, 1).flatten(1))
