"""Settings of logs, validation and previews."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import require, setting


@dataclass(frozen=True)
class LoggingConfig:
    """Logs, validation and previews while training."""

    every: int = setting(20, change="always")
    """Steps between lines of metrics.jsonl, TensorBoard points and progress lines."""
    tensorboard: bool = setting(True, change="always")
    """Write TensorBoard files next to metrics.jsonl."""
    wandb: str | None = setting(None, change="always")
    """Project of Weights & Biases to send the same values to (needs the package wandb); null: none."""
    validate_every: int = setting(0, change="always", common=True)
    """Steps between losses on held-out images with fixed noise, for the weights and each EMA; 0: never."""
    validate_images: int = setting(512, change="always")
    """Held-out images for it, the first of their split."""
    sample_every: int = setting(0, change="always", common=True)
    """Steps between grids of generated images, in previews/; 0: never."""

    def __post_init__(self) -> None:
        for name in ("every", "validate_images"):
            require(getattr(self, name) > 0, f"logging.{name} is {getattr(self, name)}; it must be positive")
        for name in ("validate_every", "sample_every"):
            require(getattr(self, name) >= 0, f"logging.{name} is {getattr(self, name)}; use 0 for never")
