"""Thresholds on the scores themselves, which a moving average learns: for rules that need no predictor.

Shape suffixes: T tokens of the batch, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .router import Router, RouterConfig
from .routing import Routing, RoutingReport, route_by_mask


def scaled_threshold(threshold: Tensor, scale: float) -> Tensor:
    """The logit whose probability is `scale` times that of the threshold's logit; never reached from 1 on."""
    if scale == 1:
        return threshold
    return torch.logit((scale * threshold.sigmoid()).clamp(max=1))


class LogitThresholdRouter(Router):
    """Base of routers in which a token goes to all experts whose logit reaches a threshold.

    The choice for a token depends on no other token, so images of a batch never depend on each other.

    Args:
        num_thresholds: E, or 1 if all experts share one.
    """

    threshold: Tensor
    num_updates: Tensor

    def __init__(self, dim: int, config: RouterConfig, num_thresholds: int) -> None:
        super().__init__(dim, config)
        self.register_buffer("threshold", torch.zeros(num_thresholds))
        # A float, so that EMAs of the model treat it as they treat the threshold.
        self.register_buffer("num_updates", torch.zeros(1))

    def reset_parameters(self) -> None:
        """Draw Xavier-uniform."""
        nn.init.xavier_uniform_(self.weight)

    def route_by_threshold(self, logits_TE: Tensor, weight_TE: Tensor) -> Routing:
        """Route by the threshold, with weights that grow with the logits.

        The host waits for the number of choices, unless there is a capacity limit.
        """
        chosen_TE = logits_TE >= scaled_threshold(self.threshold, self.threshold_scale)
        room = None if self.capacity_limit is None else math.ceil(self.capacity_limit * len(logits_TE))
        return route_by_mask(chosen_TE, weight_TE, room)

    def update_state(self, report: RoutingReport) -> None:
        """Move the threshold towards the report's.

        The mean of all reports so far, with weights that fall by `threshold_decay` a step; the first counts whole.
        """
        assert report.threshold_E is not None
        decay = self.config.threshold_decay
        self.num_updates += 1
        weight = (1 - decay) / (1 - decay**self.num_updates)
        self.threshold.lerp_(report.threshold_E.to(self.threshold.dtype), weight)
