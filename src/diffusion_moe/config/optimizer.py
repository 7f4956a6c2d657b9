"""Settings of AdamW and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import require, setting


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = setting(1e-4, common=True)
    """Peak learning rate."""
    betas: tuple[float, float] = setting((0.9, 0.999))
    """Decay of the first and second moment."""
    eps: float = setting(1e-8)
    """Added to the root of the second moment."""
    weight_decay: float = setting(0.0)
    """Decoupled weight decay, on matrices only (not on biases, norms and embeddings)."""
    warmup_steps: int = setting(0, common=True)
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = setting("constant", common=True)
    """Learning rate after the warm-up: constant, or a cosine down to 0 at the last step."""
    max_grad_norm: float | None = setting(1.0)
    """Maximum norm of the gradient, which is clipped to it; null: no clipping."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        require(
            all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas are {self.betas}; choose from 0 to below 1"
        )
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps is {self.warmup_steps}; use 0 for none")
        require(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; use 0 for none")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"optimizer.max_grad_norm is {self.max_grad_norm}; use null for no clipping",
        )
