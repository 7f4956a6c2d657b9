"""Routing rules, one class each. A new rule is one class and one call of `register_router`.

Shape suffixes: B images, N tokens of one image, T tokens of the batch (B * N), D width, E experts, K experts a token,
C tokens an expert takes, G groups of experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..routing_rules import (
    RULES,
    DiffMoERule,
    DSMoERule,
    ExpertChoiceRule,
    RoutingRule,
    TokenChoiceRule,
    names_with_thresholds,
)
from .balance import balance_loss, updated_correction_bias
from .by_time import TimeRouter
from .capacity import CapacityPredictor, capacity_loss, chosen_by_threshold, chosen_from_pool, observed_threshold
from .grouped_topk import grouped_topk
from .nucleus import NucleusRouter
from .parallel import all_gather_rows
from .promoe import ProMoERouter
from .race import RaceRouter
from .router import Router, RouterConfig
from .routing import Routing, RoutingReport, route_by_expert, route_by_mask, route_by_token
from .threshold import ThresholdRouter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenChoice(TokenChoiceRule, Router):
    """Each token takes the K experts of highest softmax score, weighted by that score (TC-DiT, DiT-MoE)."""

    e_score_correction_bias: Tensor | None

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config)
        # Added to the scores for the choice only, never to the weights.
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.num_experts) if config.balance == "bias" else None
        )

    def reset_parameters(self) -> None:
        """Draw Kaiming-uniform, as a linear layer does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        score_TE = logits_BNE.flatten(0, 1).softmax(dim=-1)
        bias_E = self.e_score_correction_bias
        expert_TK = (
            (score_TE if bias_E is None else score_TE + bias_E).topk(self.config.top_k, dim=-1, sorted=False).indices
        )
        return self.routing(expert_TK, score_TE.gather(-1, expert_TK), score_TE)

    def has_loss(self) -> bool:
        """True while an auxiliary loss is added."""
        return self.training and self.config.balance == "aux"

    def routing(self, expert_TK: Tensor, weight_TK: Tensor, share_TE: Tensor | None) -> Routing:
        """Group the choices by expert.

        Args:
            share_TE: scores that sum to 1 over experts, for the auxiliary loss; unused without.
        """
        routing = route_by_token(expert_TK, weight_TK, self.config.num_experts)
        if not self.has_loss():
            return routing
        assert share_TE is not None
        report = routing.report
        loss = self.config.balance_weight * balance_loss(share_TE, report.counts_E)
        return routing._replace(report=report._replace(losses={"balance": loss}))

    def update_state(self, report: RoutingReport) -> None:
        if self.config.balance == "bias":
            assert self.e_score_correction_bias is not None
            bias_E = self.e_score_correction_bias
            bias_E.copy_(updated_correction_bias(bias_E, report.counts_E, self.config.balance_rate))


class DSMoERouter(DSMoERule, TokenChoice):
    """Sigmoid scores; each token takes the K best experts of its best groups (DSMoE).

    The score of a group is the sum of its two best experts. Weights are the chosen sigmoids, normalised over the K and
    scaled; for K = 1 they are not normalised, because the router would learn nothing. The correction bias affects the
    choice only. It exists with `balance: none` too, as in published checkpoints.
    """

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def reset_parameters(self) -> None:
        """Draw Kaiming-normal."""
        nn.init.kaiming_normal_(self.weight)

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        """Route by grouped top-k of the sigmoids, with the correction bias in the choice only."""
        config, logits_TE = self.config, logits_BNE.flatten(0, 1)
        assert self.e_score_correction_bias is not None
        weight_TK, expert_TK, _ = grouped_topk(
            logits_TE,
            self.e_score_correction_bias,
            config.top_k,
            config.n_group,
            config.topk_group,
            config.routed_scaling_factor,
            # The published models score experts of dropped groups 0. Where we move the bias, they are excluded.
            strict=config.balance == "bias",
        )
        share_TE = None
        if self.has_loss():  # DeepSeek-V3 eq. 19: of the scores' shares
            score_TE = logits_TE.sigmoid()
            share_TE = score_TE / score_TE.sum(dim=-1, keepdim=True)
        return self.routing(expert_TK, weight_TK, share_TE)


class ExpertChoice(ExpertChoiceRule, Router):
    """Each expert takes the C best tokens of each image by softmax score (EC-DiT)."""

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        B, N, _ = logits_BNE.shape
        gate_BEN = logits_BNE.softmax(dim=-1).transpose(1, 2)
        weight_BEC, token_BEC = gate_BEN.topk(self.expert_capacity(self.settings, N), dim=-1, sorted=False)
        token_BEC = token_BEC + N * torch.arange(B, device=token_BEC.device)[:, None, None]
        return route_by_expert(token_BEC.transpose(0, 1).flatten(1), weight_BEC.transpose(0, 1).flatten(1))


class DiffMoERouter(DiffMoERule, Router):
    """While training, each expert takes the C best tokens of the whole batch by softmax score; at inference thresholds
    on a predictor's probabilities decide how many tokens it takes (DiffMoE).

    The published inference rule pools the batch, so that one image's output depends on the others. With
    `inference_pool: image` the same rule is applied to each image by itself.
    """

    threshold: Tensor

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config)
        self.predictor = CapacityPredictor(dim, config.num_experts)
        self.register_buffer("threshold", torch.zeros(config.num_experts))

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        """Route by capacity and train the predictor; at inference, route by thresholds."""
        gate_BNE = logits_BNE.softmax(dim=-1)
        predicted_BNE = self.predictor(x_BND.detach())
        if not self.training:
            return self.route_by_threshold(gate_BNE, predicted_BNE)
        gate_TE, predicted_TE = gate_BNE.flatten(0, 1), predicted_BNE.flatten(0, 1)
        if self.group is not None:
            return self.route_over_processes(gate_TE, predicted_TE, self.group)
        capacity = self.expert_capacity(self.settings, len(gate_TE))
        weight_EC, token_EC = gate_TE.T.topk(capacity, dim=-1, sorted=False)
        losses = self.losses(predicted_TE, chosen_from_pool(token_EC, len(gate_TE)))
        return route_by_expert(token_EC, weight_EC, losses, observed_threshold(predicted_TE, capacity))

    def route_by_threshold(self, gate_BNE: Tensor, predicted_BNE: Tensor) -> Routing:
        """Route at inference; the pool is an image or, as published, the batch."""
        if self.config.inference_pool == "batch":
            gate_BNE, predicted_BNE = gate_BNE.flatten(0, 1)[None], predicted_BNE.flatten(0, 1)[None]
        chosen_BNE = chosen_by_threshold(predicted_BNE, gate_BNE, self.threshold * self.threshold_scale)
        gate_TE = gate_BNE.flatten(0, 1)
        room = None if self.capacity_limit is None else math.ceil(self.capacity_limit * len(gate_TE))
        return route_by_mask(chosen_BNE.flatten(0, 1), gate_TE, room)

    def route_over_processes(self, gate_TE: Tensor, predicted_TE: Tensor, group: ProcessGroup) -> Routing:
        """Route in training over the tokens of all processes, each of which serves its own tokens.

        Costs one all-gather of scores and probabilities, and one host synchronisation for the number of choices.
        """
        all_T2E = all_gather_rows(torch.stack((gate_TE, predicted_TE), dim=1), group)
        all_gate_TE, all_predicted_TE = all_T2E.unbind(1)
        capacity = self.expert_capacity(self.settings, len(all_gate_TE))
        token_EC = all_gate_TE.T.topk(capacity, dim=-1, sorted=False).indices
        chosen_TE = chosen_from_pool(token_EC, len(all_gate_TE)).chunk(group.size())[group.rank()]
        routing = route_by_mask(chosen_TE, gate_TE)
        report = routing.report._replace(
            losses=self.losses(predicted_TE, chosen_TE),
            threshold_E=observed_threshold(all_predicted_TE, capacity),
        )
        return routing._replace(report=report)

    def losses(self, predicted_TE: Tensor, chosen_TE: Tensor) -> dict[str, Tensor]:
        """The predictor's weighted loss."""
        return {"capacity": self.config.capacity_loss_weight * capacity_loss(predicted_TE, chosen_TE)}

    def update_state(self, report: RoutingReport) -> None:
        assert report.threshold_E is not None
        self.threshold.lerp_(report.threshold_E.to(self.threshold.dtype), 1 - self.config.threshold_decay)


ROUTERS: dict[str, type[Router]] = {
    "tc": TokenChoice,
    "ec": ExpertChoice,
    "diffmoe": DiffMoERouter,
    "dsmoe": DSMoERouter,
    "race": RaceRouter,
    "threshold": ThresholdRouter,
    "promoe": ProMoERouter,
    "nucleus": NucleusRouter,
    "time": TimeRouter,
}
"""Router classes by the names of `RouterConfig.kind`; `register_router` adds to them."""


def register_router(name: str, router: type[Router]) -> None:
    """Add a routing rule, under a name for `RouterConfig.kind` and `model.router`.

    Args:
        router: subclass of `Router` with the facts of its rule, such as `experts_per_token`.

    Raises:
        ValueError: the name is taken, or the class does not define experts_per_token.
    """
    if name == "dense" or name in RULES:
        raise ValueError(f"router {name!r} exists already; choose another name")
    if router.experts_per_token is RoutingRule.experts_per_token:
        raise ValueError(f"{router.__name__} does not define experts_per_token, by which sizes are counted; add it")
    RULES[name] = router
    ROUTERS[name] = router


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


@torch.no_grad()
def update_routing_state(routers: Sequence[Router], reports: Sequence[RoutingReport]) -> None:
    """Move the state of every router by what the step learned. Call it once, after the optimizer step.

    Args:
        routers: the model's routers, in the order of the reports (`routers_of`).
        reports: of the whole step, merged over micro-batches (`merge_reports`).
    """
    assert len(routers) == len(reports)
    for router, report in zip(routers, reports):
        router.update_state(report)


def scale_thresholds(model: nn.Module, scale: float) -> None:
    """Set `Router.threshold_scale` of all routers with thresholds.

    Raises:
        ValueError: the scale is not positive, or it is not 1 and the model has no thresholds.
    """
    routers = [router for router in routers_of(model) if router.has_thresholds]
    if scale <= 0:
        raise ValueError(f"threshold_scale is {scale}; it must be positive")
    if scale != 1 and not routers:
        raise ValueError(
            f"threshold_scale is {scale}, but only {names_with_thresholds()} routers have thresholds; leave it at 1"
        )
    for router in routers:
        router.threshold_scale = scale


def set_training_capacity(model: nn.Module, capacity: float | None) -> None:
    """Set `Router.training_capacity` of all routers with a capacity schedule."""
    for router in routers_of(model):
        if router.has_capacity_schedule:
            router.training_capacity = capacity


def limit_capacity(model: nn.Module, limit: float | None) -> None:
    """Set `Router.capacity_limit` of all routers with thresholds.

    Raises:
        ValueError: the limit is not positive, or it is not None and the model has no thresholds.
    """
    routers = [router for router in routers_of(model) if router.has_thresholds]
    if limit is not None and limit <= 0:
        raise ValueError(f"capacity_limit is {limit}; it must be positive")
    if limit is not None and not routers:
        raise ValueError(f"capacity_limit is {limit}, but only {names_with_thresholds()} routers need one; remove it")
    for router in routers:
        router.capacity_limit = limit
