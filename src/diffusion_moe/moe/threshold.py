"""Expert threshold routing (arXiv 2603.11535): an expert takes the tokens whose score is above its threshold.

Shape suffixes: B images, N tokens of one image, T tokens of the batch (B * N), D width, E experts.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from ..routing_rules import ExpertChoiceRule, ThresholdRule
from .logit_threshold import LogitThresholdRouter
from .router import RouterConfig
from .routing import Routing, RoutingReport


class ThresholdRouter(ThresholdRule, LogitThresholdRouter):
    """An expert takes the tokens whose logit reaches its threshold, in training as at inference; the threshold follows,
    by a moving average, the C-th highest logit of the step's tokens, C = int(T / E * capacity) (arXiv 2603.11535).

    So loads are even on average, while no token's experts depend on another token. The step's tokens are those of all
    micro-batches and processes, which costs their logits until the end of the step and an all-gather of them; the
    authors' code averages the micro-batches' values instead. It weighs experts by the sigmoid of the logit, as here,
    and divides by the number of a token's experts, the shared one included; here the shared expert keeps weight 1, so
    nothing is divided. Its first steps are expert choice; here thresholds start at the quantile that normal tokens of
    root mean square 1 would have.
    """

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config, num_thresholds=config.num_experts)
        if self.weight.is_meta:  # as diffusers makes a model before it loads weights and thresholds
            return
        # A score is then normal with the expert's norm as standard deviation.
        share = min(max(config.capacity / config.num_experts, 1e-3), 1 - 1e-3)
        with torch.no_grad():
            self.threshold.copy_(NormalDist().inv_cdf(1 - share) * self.weight.norm(dim=-1))

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        """Route by the thresholds; in training, with the logits in the report."""
        logits_TE = logits_BNE.flatten(0, 1)
        routing = self.route_by_threshold(logits_TE, logits_TE.sigmoid())
        if not self.training:
            return routing
        report = routing.report._replace(threshold_E=self.threshold.clone(), scores_TE=logits_TE.detach())
        return routing._replace(report=report)

    def update_state(self, report: RoutingReport) -> None:
        assert report.scores_TE is not None
        capacity = ExpertChoiceRule.expert_capacity(self.config, len(report.scores_TE))
        best_EC = report.scores_TE.T.topk(capacity, dim=-1, sorted=False).values
        super().update_state(report._replace(threshold_E=best_EC.amin(dim=-1)))
