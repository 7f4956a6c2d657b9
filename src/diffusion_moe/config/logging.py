"""Settings of what is logged while training."""

from __future__ import annotations

from dataclasses import dataclass

from .require import require


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 20
    """Steps between lines of metrics.jsonl, TensorBoard points and progress lines."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases to send the same numbers to (needs the package wandb); null: none."""
    validate_every: int = 0
    """Steps between losses on held-out images with fixed noise, for the weights and each average; 0: never."""
    validate_images: int = 512
    """Held-out images for it, the first of their split."""
    sample_every: int = 0
    """Steps between pictures of generated images, in previews/; 0: never."""

    def __post_init__(self) -> None:
        for name in ("every", "validate_images"):
            require(getattr(self, name) > 0, f"logging.{name} is {getattr(self, name)}; it must be positive")
        for name in ("validate_every", "sample_every"):
            require(getattr(self, name) >= 0, f"logging.{name} is {getattr(self, name)}; use 0 for never")
