"""What the routers did."""

from .records import RoutingCounts, RoutingRecord, record_routing

__all__ = ["RoutingCounts", "RoutingRecord", "record_routing"]
