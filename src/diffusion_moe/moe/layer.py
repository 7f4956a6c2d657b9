"""The mixture-of-experts feed-forward layer: route, apply the experts, add the shared expert."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from .experts import ExpertActivation, GroupedExperts
from .feed_forward import FeedForward
from .precision import compute_dtype
from .router import RouterConfig
from .routers import ROUTERS
from .routing import RoutingContext, RoutingReport

Shared = Literal["none", "identity", "gelu", "swiglu"]


class MoEOutput(NamedTuple):
    """The layer's output and its report."""

    hidden_states: Tensor
    """Output of the input's shape and dtype; the residual is not added."""
    report: RoutingReport
    """Counts, losses to add, and the input of `update_routing_state`."""


class MoEFeedForward(nn.Module):
    """A drop-in replacement for a transformer's feed-forward layer.

    Args:
        dim: token width D.
        expert_dim: hidden width of one expert.
        router: the routing rule and its settings.
        activation: activation of the experts, "gelu" or "swiglu".
        bias: add biases to the experts.
        shared: output added for every token: "none", "identity" (the input, as in the published DSMoE without a shared
            expert), or that of a shared expert with activation "gelu" or "swiglu".
        shared_dim: hidden width of the shared expert; None: expert_dim.
        shared_bias: add biases to the shared expert.
        dropout: rate of dropout inside routed and shared experts, in training.

    Example:
        >>> layer = MoEFeedForward(64, 32, RouterConfig("dsmoe", num_experts=8, top_k=2, balance="bias"))
        >>> out = layer(torch.randn(4, 16, 64))       # 4 images of 16 tokens
        >>> loss = out.hidden_states.square().mean() + sum(out.report.losses.values())
    """

    def __init__(
        self,
        dim: int,
        expert_dim: int,
        router: RouterConfig,
        activation: ExpertActivation = "swiglu",
        bias: bool = False,
        shared: Shared = "none",
        shared_dim: int | None = None,
        shared_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ("gelu", "swiglu"):
            raise ValueError(f"activation is {activation!r}; choose gelu or swiglu")
        if shared not in ("none", "identity", "gelu", "swiglu"):
            raise ValueError(f"shared is {shared!r}; choose none, identity, gelu or swiglu")
        self.router = ROUTERS[router.kind](dim, router)
        self.experts = GroupedExperts(dim, expert_dim, router.num_experts, activation, bias, dropout)
        self.add_input = shared == "identity"
        self.shared = None
        if shared in ("gelu", "swiglu"):
            self.shared = FeedForward(dim, shared_dim or expert_dim, shared, shared_bias, dropout)

    def forward(
        self, x: Tensor, router_input: Tensor | None = None, context: RoutingContext | None = None
    ) -> MoEOutput:
        """Apply the layer.

        Args:
            x: tokens, (B, N, D), or (N, D) for one image.
            router_input: input of the router instead of x, with the same number of tokens.
            context: what else the router looks at; its rule says what (`RoutingRule.sees`).

        Raises:
            ValueError: the context lacks something.
        """
        x_BND = x if x.ndim == 3 else x[None]
        router_BND = x_BND if router_input is None else router_input.reshape(*x_BND.shape[:2], -1)
        routing = self.router(router_BND, context)
        if self.shared is not None:
            # Cast once for routed and shared experts, unless only the input is kept.
            cast_BND = x_BND if self.shared.recompute else x_BND.to(compute_dtype(x_BND))
            y_BND = self.experts(cast_BND.flatten(0, 1), routing).view_as(x_BND) + self.shared(cast_BND)
        else:
            y_BND = self.experts(x_BND.flatten(0, 1), routing).view_as(x_BND)
            if self.add_input:
                y_BND = y_BND + x_BND
        report = routing.report._replace(num_tokens=x_BND.shape[0] * x_BND.shape[1])
        return MoEOutput(y_BND.to(x.dtype).view_as(x), report)


def recompute_experts(model: nn.Module, recompute: bool = True) -> None:
    """Recompute the hidden layers of routed and shared experts in the backward pass, or keep them."""
    for layer in [module for module in model.modules() if isinstance(module, MoEFeedForward)]:
        layer.experts.recompute = recompute
        if layer.shared is not None:
            layer.shared.recompute = recompute
