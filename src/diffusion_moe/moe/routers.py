"""Routing rules, one class each. A new rule is one class here and one row in `ROUTERS`.

Routers compute in float32 whatever autocast says, and their forward is pure: what they learn stands in the report.
Shape suffixes: B images, N tokens of one image, T tokens of the batch (B * N), D width, E experts, K experts a token,
C tokens an expert takes, G groups of experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .balance import balance_loss, updated_correction_bias
from .capacity import (
    CapacityPredictor,
    capacity_loss,
    chosen_by_threshold,
    chosen_from_pool,
    observed_threshold,
)
from .grouped_topk import grouped_topk
from .parallel import all_gather_rows
from .precision import full_precision
from .routing import Routing, RoutingReport, route_by_expert, route_by_mask, route_by_token

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RouterConfig:
    """Settings of a routing rule; each rule reads the ones it knows."""

    kind: str
    """Row of `ROUTERS`: token choice, expert choice per image, DiffMoE's batch pool, DSMoE's sigmoid grouped top-k."""
    num_experts: int
    """Routed experts E."""
    top_k: int = 2
    """Experts a token is sent to (tc, dsmoe)."""
    capacity: float = 1.0
    """Experts a token is sent to on average (ec, diffmoe)."""
    n_group: int = 1
    """Groups of experts (dsmoe)."""
    topk_group: int = 1
    """Groups a token may choose from (dsmoe)."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights (dsmoe)."""
    balance: Literal["none", "aux", "bias"] = "none"
    """Balancing of tc and dsmoe: none, auxiliary loss, or a correction bias moved after each step."""
    balance_weight: float = 0.01
    """Weight of the auxiliary loss."""
    balance_rate: float = 0.001
    """Step of the correction bias."""
    capacity_loss_weight: float = 1.0
    """Weight of the capacity predictor's loss (diffmoe)."""
    threshold_decay: float = 0.95
    """Decay of the thresholds' moving average (diffmoe)."""
    inference_pool: Literal["image", "batch"] = "image"
    """Tokens that a threshold decides over at inference (diffmoe)."""

    def __post_init__(self) -> None:
        if self.kind not in ROUTERS:
            raise ValueError(f"router kind {self.kind!r} is unknown; choose one of {', '.join(ROUTERS)}")
        if self.balance not in ("none", "aux", "bias"):
            raise ValueError(f"balance is {self.balance!r}; choose none, aux or bias")
        if self.inference_pool not in ("image", "batch"):
            raise ValueError(f"inference_pool is {self.inference_pool!r}; choose image or batch")
        if not 0 < self.top_k <= self.num_experts:
            raise ValueError(f"top_k is {self.top_k}; choose 1 to num_experts {self.num_experts}")
        if not 0 < self.capacity <= self.num_experts:
            raise ValueError(f"capacity is {self.capacity}; choose above 0 to num_experts {self.num_experts}")
        if self.n_group < 1 or self.num_experts % self.n_group:
            raise ValueError(f"num_experts {self.num_experts} is not divisible by n_group {self.n_group}")
        if self.top_k > self.topk_group * self.num_experts // self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group {self.topk_group} of n_group {self.n_group} cannot give top_k {self.top_k} experts"
            )


class Router(nn.Module):
    """What all rules share: one vector an expert, scored against the token in float32."""

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of standard deviation 0.006, as the published DiffMoE and EC-DiT draw their gates."""
        nn.init.normal_(self.weight, std=0.006)

    def forward(self, x_BND: Tensor) -> Routing:
        """Route the tokens of a batch of images; token n of image b is number b * N + n."""
        with full_precision(x_BND):
            x_BND = x_BND.to(torch.promote_types(x_BND.dtype, torch.float32))
            return self.route(x_BND, F.linear(x_BND, self.weight.to(x_BND.dtype)))

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        """The rule itself, in full precision."""
        raise NotImplementedError

    def update_state(self, report: RoutingReport) -> None:
        """Move the state by what a step learned (`update_routing_state` calls this after the optimizer step)."""

    def expert_capacity(self, num_tokens: int) -> int:
        """Tokens each expert takes out of a pool of `num_tokens`: the published int(T / E * capacity), at least one."""
        return max(1, int(num_tokens / self.config.num_experts * self.config.capacity))


class TokenChoice(Router):
    """Each token takes the K experts of highest softmax score, weighted by that score (TC-DiT, DiT-MoE)."""

    e_score_correction_bias: Tensor | None

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config)
        # Added to the scores for the choice only, never to the weights.
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.num_experts) if config.balance == "bias" else None
        )

    def reset_parameters(self) -> None:
        """Kaiming-uniform as for a linear layer."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        score_TE = logits_BNE.flatten(0, 1).softmax(dim=-1)
        corrected_TE = score_TE if self.e_score_correction_bias is None else score_TE + self.e_score_correction_bias
        expert_TK = corrected_TE.topk(self.config.top_k, dim=-1, sorted=False).indices
        return self.routing(expert_TK, score_TE.gather(-1, expert_TK), score_TE)

    def has_loss(self) -> bool:
        """Whether there is an auxiliary loss now."""
        return self.training and self.config.balance == "aux"

    def routing(self, expert_TK: Tensor, weight_TK: Tensor, share_TE: Tensor | None) -> Routing:
        """Group by expert; `share_TE` (summing to 1 over experts) is what an auxiliary loss evens out."""
        losses = {}
        if self.has_loss():
            assert share_TE is not None
            losses["balance"] = self.config.balance_weight * balance_loss(share_TE, expert_TK)
        return route_by_token(expert_TK, weight_TK, self.config.num_experts, losses)

    def update_state(self, report: RoutingReport) -> None:
        if self.config.balance == "bias":
            assert self.e_score_correction_bias is not None
            bias_E = self.e_score_correction_bias
            bias_E.copy_(updated_correction_bias(bias_E, report.counts_E, self.config.balance_rate))


class DSMoERouter(TokenChoice):
    """DSMoE: sigmoid scores; a token keeps its best groups of experts and the K best experts inside them.

    A group scores the sum of its two best experts. Weights are the chosen sigmoids, normalised over the K (not for
    K = 1: then the router would learn nothing) and scaled. The correction bias takes part in the choice only; it is
    kept with `balance: none` too, as published checkpoints do.
    """

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def reset_parameters(self) -> None:
        """Kaiming-normal."""
        nn.init.kaiming_normal_(self.weight)

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        config, logits_TE, share_TE = self.config, logits_BNE.flatten(0, 1), None
        assert self.e_score_correction_bias is not None
        groups = (config.n_group, config.topk_group)
        # The published models score experts of dropped groups 0; where we move the bias ourselves, they are out.
        strict = config.balance == "bias"
        weight_TK, expert_TK, _ = grouped_topk(
            logits_TE, self.e_score_correction_bias, config.top_k, *groups, config.routed_scaling_factor, strict
        )
        if self.has_loss():  # DeepSeek-V3 eq. 19: it sees the scores' shares
            score_TE = logits_TE.sigmoid()
            share_TE = score_TE / score_TE.sum(dim=-1, keepdim=True)
        return self.routing(expert_TK, weight_TK, share_TE)


class ExpertChoice(Router):
    """Each expert takes the C best tokens of each image by softmax score (EC-DiT)."""

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        B, N, _ = logits_BNE.shape
        gate_BEN = logits_BNE.softmax(dim=-1).transpose(1, 2)
        weight_BEC, token_BEC = gate_BEN.topk(self.expert_capacity(N), dim=-1, sorted=False)
        token_BEC = token_BEC + N * torch.arange(B, device=token_BEC.device)[:, None, None]
        return route_by_expert(token_BEC.transpose(0, 1).flatten(1), weight_BEC.transpose(0, 1).flatten(1))


class DiffMoERouter(Router):
    """DiffMoE: each expert takes the C best tokens of the whole batch by softmax score while training; at inference
    thresholds on a predictor's probabilities decide how many.

    The published inference rule pools the batch, so that one image's answer depends on the others. With
    `inference_pool: image` the same rule is applied to each image by itself.
    """

    threshold: Tensor
    threshold_scale: float = 1.0
    """Factor on the thresholds at inference: below 1 more compute for each token, above 1 less."""
    group: ProcessGroup | None = None
    """Processes whose batches make one pool while training; None: the pool is this process' batch."""
    capacity_limit: float | None = None
    """Experts a token on average that inference makes room for; None: as many as the thresholds choose."""

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config)
        self.predictor = CapacityPredictor(dim, config.num_experts)
        self.register_buffer("threshold", torch.zeros(config.num_experts))

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        """In training the pool's best tokens, and what the predictor learns of them; else by threshold."""
        gate_BNE = logits_BNE.softmax(dim=-1)
        predicted_BNE = self.predictor(x_BND.detach())
        if not self.training:
            if self.config.inference_pool == "batch":
                predicted_BNE, gate_BNE = predicted_BNE.flatten(0, 1)[None], gate_BNE.flatten(0, 1)[None]
            chosen_PME = chosen_by_threshold(predicted_BNE, gate_BNE, self.threshold * self.threshold_scale)
            gate_TE = gate_BNE.flatten(0, 1)
            room = None if self.capacity_limit is None else math.ceil(self.capacity_limit * len(gate_TE))
            return route_by_mask(chosen_PME.flatten(0, 1), gate_TE, room)
        gate_TE, predicted_TE = gate_BNE.flatten(0, 1), predicted_BNE.flatten(0, 1)
        if self.group is not None:
            return self.route_over_processes(gate_TE, predicted_TE, self.group)
        capacity = self.expert_capacity(len(gate_TE))
        weight_EC, token_EC = gate_TE.T.topk(capacity, dim=-1, sorted=False)
        losses = self.losses(predicted_TE, chosen_from_pool(token_EC, len(gate_TE)))
        return route_by_expert(token_EC, weight_EC, losses, observed_threshold(predicted_TE, capacity))

    def route_over_processes(self, gate_TE: Tensor, predicted_TE: Tensor, group: ProcessGroup) -> Routing:
        """The same over the tokens of a group of processes, of which each serves its own.

        Costs one gathering of all scores and probabilities, and one synchronisation for how many were chosen here.
        """
        every_T2E = all_gather_rows(torch.stack((gate_TE, predicted_TE), dim=1), group)
        every_gate_TE, every_predicted_TE = every_T2E.unbind(1)
        capacity = self.expert_capacity(len(every_gate_TE))
        token_EC = every_gate_TE.T.topk(capacity, dim=-1, sorted=False).indices
        chosen_TE = chosen_from_pool(token_EC, len(every_gate_TE)).chunk(group.size())[group.rank()]
        routing = route_by_mask(chosen_TE, gate_TE)
        report = routing.report._replace(
            losses=self.losses(predicted_TE, chosen_TE),
            threshold_E=observed_threshold(every_predicted_TE, capacity),
        )
        return routing._replace(report=report)

    def losses(self, predicted_TE: Tensor, chosen_TE: Tensor) -> dict[str, Tensor]:
        """What the predictor learns from."""
        return {"capacity": self.config.capacity_loss_weight * capacity_loss(predicted_TE, chosen_TE)}

    def update_state(self, report: RoutingReport) -> None:
        assert report.threshold_E is not None
        self.threshold.lerp_(report.threshold_E.to(self.threshold.dtype), 1 - self.config.threshold_decay)


ROUTERS: dict[str, type[Router]] = {
    "tc": TokenChoice,
    "ec": ExpertChoice,
    "diffmoe": DiffMoERouter,
    "dsmoe": DSMoERouter,
}


def scale_thresholds(model: nn.Module, scale: float) -> None:
    """Trade compute for quality in a model of DiffMoE layers: see `DiffMoERouter.threshold_scale`.

    Raises:
        ValueError: the scale is not positive, or the model has no thresholds and the scale is not 1.
    """
    pools = [router for router in routers_of(model) if isinstance(router, DiffMoERouter)]
    if scale <= 0:
        raise ValueError(f"threshold_scale is {scale}; it must be positive")
    if scale != 1 and not pools:
        raise ValueError(f"threshold_scale is {scale}, but only diffmoe routers have thresholds; leave it at 1")
    for pool in pools:
        pool.threshold_scale = scale


def limit_capacity(model: nn.Module, limit: float | None) -> None:
    """Make room for so many experts a token in a model's DiffMoE layers: see `DiffMoERouter.capacity_limit`.

    Raises:
        ValueError: the limit is not positive, or the model has no thresholds and the limit is not None.
    """
    pools = [router for router in routers_of(model) if isinstance(router, DiffMoERouter)]
    if limit is not None and limit <= 0:
        raise ValueError(f"capacity_limit is {limit}; it must be positive")
    if limit is not None and not pools:
        raise ValueError(f"capacity_limit is {limit}, but only diffmoe routers need one; leave it out")
    for pool in pools:
        pool.capacity_limit = limit


def routers_of(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]
