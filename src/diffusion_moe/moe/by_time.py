"""Experts by time: each expert serves the images of one range of t. Shape suffixes: B images, N tokens of one image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..routing_rules import TimeRule
from .router import Router, RouterConfig
from .routing import Routing, RoutingContext, route_by_token

DECIMALS = 6
"""Decimals that times are rounded to, because 1 - sigma of a scheduler differs from a boundary in the last bits."""


class TimeRouter(TimeRule, Router):
    """All tokens of an image go to the expert of the range of its t, with weight 1; nothing is learned or balanced.

    A boundary belongs to the noisier range. Wan 2.2 divides the times in two, for two whole models; here attention,
    embedders and a shared expert are common to all times.
    """

    def __init__(self, dim: int, config: RouterConfig) -> None:
        nn.Module.__init__(self)  # without the vectors of a `Router`
        self.config = config
        even = tuple(i / config.num_experts for i in range(1, config.num_experts))
        self.boundaries = even if config.time_boundaries is None else config.time_boundaries

    def forward(self, x_BND: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route the tokens of a batch of images by the context's times."""
        time_B = self.seen(context)["time_B"]
        assert time_B is not None
        time_B = time_B.round(decimals=DECIMALS)
        expert_B = torch.zeros_like(time_B, dtype=torch.long)
        for boundary in self.boundaries:
            expert_B = expert_B + (time_B > boundary)
        expert_TK = expert_B[:, None].expand(x_BND.shape[:2]).reshape(-1, 1)
        weight_TK = torch.ones_like(expert_TK, dtype=torch.promote_types(x_BND.dtype, torch.float32))
        return route_by_token(expert_TK, weight_TK, self.config.num_experts)
