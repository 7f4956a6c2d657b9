"""The mixture-of-experts feed-forward layer and its routing rules. Imports torch alone.

Read in this order: `layer.py`, `router.py`, `routers.py`, `routing.py`, `experts.py`, `expert_autograd.py`, `ops.py`.
Triton kernels for GPUs are in `kernels/`; `backend.py` chooses between them and torch.
"""

from .experts import GroupedExperts, experts_loop
from .feed_forward import FeedForward
from .layer import MoEFeedForward, MoEOutput, recompute_experts
from .router import Router, RouterConfig
from .routers import (
    ROUTERS,
    limit_capacity,
    register_router,
    routers_of,
    scale_thresholds,
    set_training_capacity,
    update_routing_state,
)
from .routing import (
    Routing,
    RoutingContext,
    RoutingReport,
    merge_reports,
    route_by_expert,
    route_by_mask,
    route_by_pair,
    route_by_token,
)

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
    "route_by_pair",
    "route_by_token",
    "routers_of",
    "scale_thresholds",
    "set_training_capacity",
    "update_routing_state",
]
