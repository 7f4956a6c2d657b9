"""The mixture-of-experts feed-forward layer and its routing rules. Imports torch alone.

Read in this order: `layer.py`, `routers.py`, `routing.py`, `experts.py`, `expert_autograd.py`, `ops.py`. Triton kernels
for GPUs are in `kernels/`; `backend.py` chooses between them and torch.
"""

from .by_time import TimeRouter
from .experts import GroupedExperts, experts_loop
from .feed_forward import FeedForward
from .layer import MoEFeedForward, MoEOutput, recompute_experts
from .nucleus import NucleusRouter
from .routers import (
    ROUTERS,
    Router,
    RouterConfig,
    limit_capacity,
    register_router,
    routers_of,
    scale_thresholds,
    update_routing_state,
)
from .routing import (
    Routing,
    RoutingContext,
    RoutingReport,
    merge_reports,
    route_by_expert,
    route_by_mask,
    route_by_token,
)

# The rules with files of their own, which import the base class from `routers.py`.
ROUTERS["nucleus"] = NucleusRouter
ROUTERS["time"] = TimeRouter

__all__ = [
    "ROUTERS",
    "FeedForward",
    "GroupedExperts",
    "MoEFeedForward",
    "MoEOutput",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingContext",
    "RoutingReport",
    "experts_loop",
    "limit_capacity",
    "merge_reports",
    "recompute_experts",
    "register_router",
    "route_by_expert",
    "route_by_mask",
    "route_by_token",
    "routers_of",
    "scale_thresholds",
    "update_routing_state",
]
