"""Options of the command `bench`. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

What = Literal["layer", "step", "sample", "products", "scaling"]
Against = Literal["loop", "dense", "transformers", "scattermoe", "sonicmoe"]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how long."""

    recipe: str = "dsmoe-s-e48"
    """A shipped recipe (see `diffusion-moe recipes`) or a YAML file; it must have experts. Dropout inside experts is
    off."""
    tokens: int = 4096
    """Tokens of a batch: images times tokens of an image."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of products (bfloat16: autocast over float32 weights)."""
    against: Against | None = None
    """What layer, step and sample are held against; null: loop. loop: the same as a plain loop over experts. dense: a
    dense layer with as many activated parameters. transformers, scattermoe, sonicmoe: that library's experts with our
    weights and our routing (token choice, SwiGLU without biases), where it is installed."""
    recompute: bool = False
    """layer, step: ours makes the experts' hidden layers again in the backward pass (training.recompute experts)."""
    acceleration: Literal["none", "compile", "graph"] = "none"
    """Of both contestants. step: compile; sample: compile or graph (the capture counts: take many solver_steps)."""
    solver_steps: int = 4
    """Steps of sample's solver."""
    seconds: float = 10.0
    """About how long to time each measurement; of scaling, each axis."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("tokens", "seconds", "solver_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
