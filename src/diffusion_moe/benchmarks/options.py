"""Options of the command `bench`. This file imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

What = Literal["layer", "step", "sample", "matmuls", "scaling", "waits"]


@dataclass(frozen=True)
class BenchOptions:
    """Setting to measure, and the time for it."""

    recipe: str = "dsmoe-s-e48"
    """A shipped recipe (see `diffusion-moe recipes`) or a YAML file; except for waits it must have experts. Dropout
    inside experts is off. waits runs a small model of the recipe's kind, of its own size."""
    tokens: int = 4096
    """Tokens of a batch: images times tokens of an image."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of matmuls (bfloat16: autocast over float32 weights)."""
    recompute: bool = False
    """layer, step: recompute the experts' hidden layers in the backward pass (training.recompute experts)."""
    acceleration: Literal["none", "compile", "graph"] = "none"
    """step: compile; sample: compile or graph (the capture counts: take many solver_steps)."""
    solver_steps: int = 4
    """Steps of sample's solver."""
    seconds: float = 10.0
    """Approximate time of each measurement; for scaling, of each axis."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one. waits without a GPU: a stand-in for one, on which nothing is computed."""

    def __post_init__(self) -> None:
        for name in ("tokens", "seconds", "solver_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")


def check_old_words(arguments: Sequence[str]) -> None:
    """Refuse words that `bench` once took, naming what replaced them."""
    if arguments and arguments[0] == "products":
        raise ValueError("bench products is now called matmuls; use diffusion-moe bench matmuls")
    if any(argument.partition("=")[0] == "--against" for argument in arguments):
        raise ValueError(
            "--against is not an option of bench, which times this library alone; "
            "use python benchmarks/compare.py in the repository"
        )
