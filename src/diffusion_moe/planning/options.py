"""Settings of the command `plan`."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.fields import POSITIVE, UP_TO_ONE, Settings, setting


@dataclass(frozen=True)
class PlanOptions(Settings):
    """The processes and GPUs to plan for."""

    world: int | None = setting(None, common=True, valid=POSITIVE)
    """Processes, each with a GPU; null: parallel.replicate x shard x experts. Where the recipe leaves these at 1,
    layouts of so many processes are compared."""
    memory_gb: float = setting(80.0, common=True, valid=POSITIVE)
    """Memory of a GPU, in units of 1e9 bytes."""
    peak_tflops: float = setting(989.0, common=True, valid=POSITIVE)
    """Peak FLOP/s of a GPU, in units of 1e12; 989 is an H100's or H200's in bfloat16."""
    utilisation: float = setting(0.35, common=True, valid=UP_TO_ONE)
    """Share of that peak that training reaches: model_flops_utilisation in a run's metrics.jsonl."""
    json: bool = setting(False, common=True)
    """Print one JSON object instead of tables."""
