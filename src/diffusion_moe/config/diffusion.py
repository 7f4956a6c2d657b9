"""Settings of the training time and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import require, setting
from .model import Prediction


@dataclass(frozen=True)
class DiffusionConfig:
    """How times and labels are drawn in training, and what the loss compares."""

    loss: Prediction | None = setting(None)
    """Prediction that the mean squared error compares, after converting the model's output to it: velocity, x or
    epsilon; null: the model's own prediction. JiT predicts x and compares velocities."""
    loss_min_gap: float | None = setting(None)
    """Smallest 1 - t (from x) or t (from epsilon) that this conversion divides by; null: model.min_gap. Velocities
    weight errors of x by 1 / max(1 - t, loss_min_gap)^2: with 0.4, late ones 6 times as much as early ones."""
    time: Literal["uniform", "logit_normal"] = setting("uniform")
    """Distribution of the training time t in [0, 1] (0 is noise, 1 is data); of ddpm's step, uniform only."""
    time_mean: float = setting(0.0)
    """Mean of the normal under the logistic function (time: logit_normal)."""
    time_std: float = setting(1.0)
    """Standard deviation of that normal."""
    class_dropout: float = setting(0.1)
    """Share of training samples whose class is replaced by the null class, for guidance."""
    caption_dropout: float = setting(0.1)
    """Share of training samples whose caption is replaced by the null prompt, for guidance (model.text_dim); decided by
    the same random number as class_dropout."""

    def __post_init__(self) -> None:
        gap = self.loss_min_gap
        require(gap is None or 0 < gap <= 1, f"diffusion.loss_min_gap is {gap}; it must be above 0 and at most 1")
        require(self.time_std > 0, f"diffusion.time_std is {self.time_std}; it must be positive")
        require(0 <= self.class_dropout <= 1, f"diffusion.class_dropout is {self.class_dropout}; choose from 0 to 1")
        require(
            0 <= self.caption_dropout <= 1, f"diffusion.caption_dropout is {self.caption_dropout}; choose from 0 to 1"
        )
