"""Settings of the distributed run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .require import require


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread over processes: replicate x shard x experts must be as many as torchrun started."""

    replicate: int = 1
    """Copies of the model, each on its share of the batch."""
    shard: int = 1
    """Processes that share one copy's weights (FSDP2)."""
    experts: int = 1
    """Processes that share the experts, each holding some of them whole; tokens travel."""
    pool: Literal["rank", "global"] = "rank"
    """Tokens that DiffMoE's experts choose from: those of a process, or of all of them. Global costs a gathering of all
    scores in each mixture layer."""

    def __post_init__(self) -> None:
        for name in ("replicate", "shard", "experts"):
            require(getattr(self, name) > 0, f"parallel.{name} is {getattr(self, name)}; it must be positive")
