"""Options of the command; imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import require


@dataclass(frozen=True)
class TextEncoderOptions:
    """Size and training of the encoder."""

    width: int = 64
    """Width of the features."""
    layers: int = 3
    """Layers of the encoder."""
    heads: int = 4
    """Attention heads."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 128
    """Captions a step."""
    learning_rate: float = 3e-3
    """Peak, after a warm-up over the first tenth of the steps; then a cosine down to 0."""
    seed: int = 0
    """Seed of the initial weights and the captions."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "steps", "batch_size", "learning_rate"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        require(self.width % self.heads == 0, f"width {self.width} is not divisible by heads {self.heads}")
        require(0 <= self.seed < 2**63, f"seed is {self.seed}; choose from 0 to 2^63 - 1")
