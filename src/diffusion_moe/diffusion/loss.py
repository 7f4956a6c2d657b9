"""Losses between prediction and target."""

from __future__ import annotations

from torch import Tensor


def velocity_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,), in float32; extra predicted channels (learn_sigma) are left out."""
    error = prediction[:, : velocity.shape[1]].float() - velocity.float()
    return error.square().flatten(1).mean(dim=1)
