"""The mixture-of-experts feed-forward layer and its routing rules. Imports torch alone."""

from .balance import update_routing_state
from .experts import GroupedExperts, experts_loop
from .feed_forward import FeedForward
from .layer import MoEFeedForward, MoEOutput, recompute_experts
from .routers import ROUTERS, Router, RouterConfig, limit_capacity, routers_of, scale_thresholds
from .routing import Routing, RoutingReport, merge_reports, route_by_expert, route_by_mask, route_by_token

__all__ = [
    "ROUTERS",
    "FeedForward",
    "GroupedExperts",
    "MoEFeedForward",
    "MoEOutput",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingReport",
    "experts_loop",
    "limit_capacity",
    "merge_reports",
    "recompute_experts",
    "route_by_expert",
    "route_by_mask",
    "route_by_token",
    "routers_of",
    "scale_thresholds",
    "update_routing_state",
]
