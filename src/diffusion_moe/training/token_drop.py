"""Choice of the tokens that the middle blocks do not see, a function of (seed, step, sample).

Shape suffixes: S samples, N tokens of an image, K kept ones, Q squares, P tokens of a square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Recipe
from ..config.token_drop import num_kept, square_of
from ..models.token_drop import NOTHING_DROPPED, TokenDrop
from ..randomness import uniform, uniforms


def choose_drop(recipe: Recipe, step: int, samples_S: Tensor, grid: tuple[int, int]) -> TokenDrop:
    """What the middle blocks leave out of some of a step's images.

    The numbers of tokens follow from the step alone, so that nothing waits for the device.

    Args:
        recipe: the recipe of the run.
        step: number of the step, from 1.
        samples_S: indices of the images in the step's global batch, int64, (S,).
        grid: rows and columns of an image's tokens.

    Raises:
        ValueError: squares do not fill the grid.
    """
    training, drop = recipe.training, NOTHING_DROPPED
    if training.path_drop_rate:
        path = uniform(training.seed, "path_drop", step, samples_S) < training.path_drop_rate
        drop = drop._replace(path=path)
    rate = training.drop_rate_at(step)
    if not rate:
        return drop
    number_SN = uniforms(training.seed, "token_drop", step, samples_S, grid[0] * grid[1])
    if training.token_selection == "squares":
        return drop._replace(kept_BK=kept_of_squares(number_SN, grid, *square_of(rate, *grid)))
    return drop._replace(kept_BK=kept_of_all(number_SN, num_kept(number_SN.shape[1], rate)))


def kept_of_all(number_SN: Tensor, count: int) -> Tensor:
    """Indices of the tokens with the least numbers, ascending, (S, K)."""
    return number_SN.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def kept_of_squares(number_SN: Tensor, grid: tuple[int, int], side: int, count: int) -> Tensor:
    """The same with `count` tokens of each square of so many tokens a side."""

    def squares(x: Tensor) -> Tensor:  # (..., N) to (..., Q, P)
        cells = x.unflatten(-1, (grid[0] // side, side, grid[1] // side, side)).transpose(-3, -2)
        return cells.flatten(-4, -3).flatten(-2)

    token_QP = squares(torch.arange(grid[0] * grid[1], device=number_SN.device))
    least_SQP = squares(number_SN).argsort(dim=2, stable=True)[..., :count]
    kept_SQP = token_QP.expand(len(number_SN), -1, -1).gather(2, least_SQP)
    return kept_SQP.flatten(1).sort(dim=1).values
