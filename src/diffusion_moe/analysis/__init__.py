"""Analysis of routing: the recorder, and reports of figures and data."""

from .recorder import RoutingCounts, RoutingRecord, record_routing

__all__ = ["RoutingCounts", "RoutingRecord", "record_routing"]
