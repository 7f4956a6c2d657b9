"""Losses between prediction and target."""

from __future__ import annotations

from torch import Tensor

from .path import PathSample
from .prediction import Prediction, convert


def mean_square(error: Tensor) -> Tensor:
    """Mean square over all but the first axis, (B,)."""
    return error.square().flatten(1).mean(dim=1)


def flow_loss(
    output: Tensor,
    point: PathSample,
    prediction: Prediction = "velocity",
    loss_space: Prediction | None = None,
    min_gap: float = 0.0,
) -> Tensor:
    """Mean squared error of each sample, (B,), float32, between the network's output and the target.

    Both are converted alike from `prediction` to `loss_space`, with the same clamped gap, so a perfect output has
    loss 0. JiT (arXiv 2511.13720) uses prediction x, loss_space velocity and min_gap 0.05.

    Args:
        output: (B, C or more, H, W); channels beyond the data's (learn_sigma) are ignored.
        point: the point on the path, with the target.
        prediction: the quantity that the network predicts.
        loss_space: the quantity that is compared; None: `prediction`.
        min_gap: as for `convert`.
    """
    space, x_t, t = loss_space or prediction, point.x_t.float(), point.t.float()
    target: Tensor = getattr(point, prediction)
    predicted = convert(output[:, : target.shape[1]].float(), x_t, t, prediction, space, min_gap)
    return mean_square(predicted - convert(target.float(), x_t, t, prediction, space, min_gap))
