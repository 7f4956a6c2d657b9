"""What the routers did."""

from .records import RoutingRecord, record_routing

__all__ = ["RoutingRecord", "record_routing"]
