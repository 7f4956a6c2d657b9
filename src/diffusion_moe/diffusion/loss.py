"""Losses between prediction and target."""

from __future__ import annotations

from torch import Tensor

from .path import PathSample
from .prediction import Prediction, convert


def mean_square(error: Tensor) -> Tensor:
    """Mean of the squares over all but the first axis, (B,)."""
    return error.square().flatten(1).mean(dim=1)


def flow_loss(
    output: Tensor,
    point: PathSample,
    prediction: Prediction = "velocity",
    loss_space: Prediction | None = None,
    min_gap: float = 0.0,
) -> Tensor:
    """Mean squared error of each sample, (B,), in float32, between the network's answer and the truth.

    Both are taken as `prediction` and converted alike to `loss_space`: where a clamped gap bends the one it bends the
    other, so a perfect answer costs nothing. JiT (arXiv 2511.13720): prediction x, loss_space velocity, min_gap 0.05.

    Args:
        output: (B, C or more, H, W); channels beyond the data's (learn_sigma) are left out.
        loss_space: None: the same as `prediction`.
        min_gap: as for `convert`.
    """
    space, x_t, t = loss_space or prediction, point.x_t.float(), point.t.float()
    truth: Tensor = getattr(point, prediction)
    answered = convert(output[:, : truth.shape[1]].float(), x_t, t, prediction, space, min_gap)
    return mean_square(answered - convert(truth.float(), x_t, t, prediction, space, min_gap))
