"""Settings of the command `plan`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanOptions:
    """The processes and GPUs to plan for."""

    world: int | None = None
    """Processes, each with a GPU; null: parallel.replicate x shard x experts. Where the recipe leaves these at 1,
    layouts of so many processes are compared."""
    memory_gb: float = 80.0
    """Memory of a GPU, in units of 1e9 bytes."""
    peak_tflops: float = 989.0
    """Peak FLOP/s of a GPU, in units of 1e12; 989 is an H100's or H200's in bfloat16."""
    utilisation: float = 0.35
    """Share of that peak that training reaches: model_flops_utilisation in a run's metrics.jsonl."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        for name in ("world", "memory_gb", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation is {self.utilisation}; choose from above 0 to 1")
