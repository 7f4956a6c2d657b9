"""The base of all routers, and their settings.

A router inherits the facts of its rule from `routing_rules`. It computes in float32 whatever autocast and
TensorFloat-32 settings say. Its forward changes nothing: what it learns is in the report, and `update_routing_state`
moves its state after the optimizer step.
Shape suffixes: B images, N tokens of one image, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..routing_rules import RULES, RoutingRule
from .precision import exact_float32, exact_linear, full_precision
from .routing import Routing, RoutingContext, RoutingReport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RouterConfig:
    """Settings of a routing rule. Each rule reads some of them (`RoutingRule.reads`), and checks these alone."""

    kind: str
    """Name of the rule: tc (token choice), ec (expert choice per image), diffmoe (batch pool with a capacity
    predictor), dsmoe (sigmoid grouped top-k), race (one top-k over all tokens and experts),
    threshold (tokens above each expert's threshold), promoe (prototypes, and an expert for images without a class),
    nucleus (expert choice per image by token and time), time (an expert for each range of t), or one of
    `register_router`."""
    num_experts: int
    """Number of routed experts E."""
    top_k: int = 2
    """Experts a token is sent to (tc, dsmoe, promoe)."""
    capacity: float = 1.0
    """Experts a token is sent to on average (ec, diffmoe, race, threshold, nucleus)."""
    n_group: int = 1
    """Number of groups that the experts are divided into (dsmoe)."""
    topk_group: int = 1
    """Number of groups that a token may choose experts from (dsmoe)."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' weights (dsmoe, promoe, nucleus)."""
    balance: Literal["none", "aux", "bias"] = "none"
    """Load balancing of tc and dsmoe: none, an auxiliary loss, or a correction bias moved after each step."""
    balance_weight: float = 0.01
    """Weight of the auxiliary loss."""
    balance_rate: float = 0.001
    """Step of the correction bias."""
    capacity_loss_weight: float = 1.0
    """Weight of the capacity predictor's loss (diffmoe)."""
    threshold_decay: float = 0.95
    """Decay of the moving average of the thresholds (diffmoe, race, threshold)."""
    inference_pool: Literal["image", "batch"] = "image"
    """Tokens that thresholds choose from at inference (diffmoe): those of each image, or of the whole batch."""
    similarity_loss_weight: float = 1e-4
    """Weight of the router similarity loss (race)."""
    target_loss_weight: float = 1e-2
    """Weight of each layer's loss of predicting the training target (race); used by who computes that loss."""
    target_dim: int = 0
    """Values of the training target that a token stands for (race); 0: routers do not predict it."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss of prototypes (promoe)."""
    contrastive_temperature: float = 0.07
    """Temperature of that loss (promoe)."""
    time_boundaries: tuple[float, ...] | None = None
    """Times between the ranges of t of the experts, ascending, 0 is noise (time); None: ranges of equal length."""

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise ValueError(f"router kind {self.kind!r} is unknown; choose one of {', '.join(RULES)}")
        RULES[self.kind].check(self)


class Router(RoutingRule, nn.Module):
    """Base of all routers: one vector an expert, scored against each token in float32.

    Subclasses implement `route`, and `update_state` if they have a state.
    """

    group: ProcessGroup | None = None
    """Processes whose batches make one pool while training, for rules that choose over the whole batch; None: the pool
    is this process' batch."""
    threshold_scale: float = 1.0
    """Factor on the thresholds at inference, for rules with `has_thresholds`: below 1 more experts a token, above 1
    fewer."""
    capacity_limit: float | None = None
    """Experts a token on average that inference has room for, for rules with `has_thresholds`; None: no limit."""
    training_capacity: float | None = None
    """Capacity in training instead of the settings', for rules with `has_capacity_schedule`; None: the settings'."""

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(self.parameter_shapes(config, dim)["weight"]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from a normal of standard deviation 0.006, as the published DiffMoE and EC-DiT do."""
        nn.init.normal_(self.weight, std=0.006)

    @property
    def settings(self) -> RouterConfig:
        """The settings with the capacity of now."""
        if self.training_capacity is None or not self.training:
            return self.config
        return replace(self.config, capacity=self.training_capacity)

    def forward(self, x_BND: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route the tokens of a batch of images; token n of image b has index b * N + n.

        Args:
            context: what else the router looks at; its rule says what (`RoutingRule.sees`).

        Raises:
            ValueError: the context lacks something.
        """
        seen = self.seen(context)
        with full_precision(x_BND), exact_float32():
            x_BND = self.features(x_BND.to(torch.promote_types(x_BND.dtype, torch.float32)))
            return self.route(x_BND, exact_linear(x_BND, self.weight.to(x_BND.dtype)), **seen)

    def seen(self, context: RoutingContext | None) -> dict[str, Tensor | None]:
        """What the router looks at beside the tokens, by name.

        Raises:
            ValueError: the context lacks something.
        """
        seen = {name: getattr(context, name, None) for name in sorted(self.sees)}
        # Without `unconditional_B` all images have a class or a prompt.
        missing = [name for name, tensor in seen.items() if tensor is None and name != "unconditional_B"]
        if missing:
            raise ValueError(f"router {self.config.kind} needs {', '.join(missing)}; pass it in a RoutingContext")
        return seen

    def features(self, x_BND: Tensor) -> Tensor:
        """What the experts' vectors are scored against, (B, N, D): the tokens, unless a rule computes it from them."""
        return x_BND

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        """Assign tokens to experts, in float32 or float64; a rule also takes what it `sees`, by name.

        Args:
            x_BND: `features` of the tokens.
            logits_BNE: their scores.
        """
        raise NotImplementedError

    def update_state(self, report: RoutingReport) -> None:
        """Move the state by the report of a whole step; `update_routing_state` calls this after the optimizer step."""
