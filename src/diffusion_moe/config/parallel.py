"""Settings of the distributed run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import require, setting


@dataclass(frozen=True)
class ParallelConfig:
    """Distribution over processes: replicate x shard x experts must be the number that torchrun started."""

    replicate: int = setting(1, change="always")
    """Copies of the model, each on its share of the batch."""
    shard: int = setting(1, change="always", common=True)
    """Processes that a copy's weights are sharded over (FSDP2)."""
    experts: int = setting(1, change="always", common=True)
    """Processes that the experts are distributed over; tokens are dispatched between them."""
    pool: Literal["rank", "global"] = setting("rank")
    """Tokens that DiffMoE's experts choose from: those of a process, or of all processes. Global gathers all scores in
    each MoE layer."""

    def __post_init__(self) -> None:
        for name in ("replicate", "shard", "experts"):
            require(getattr(self, name) > 0, f"parallel.{name} is {getattr(self, name)}; it must be positive")
