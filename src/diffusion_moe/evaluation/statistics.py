"""Mean and covariance of features from float64 sums, which add up over batches and processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import all_reduce_sum


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of features, float64."""

    mean_D: Tensor
    covariance_DD: Tensor


@dataclass(frozen=True)
class FeatureSums:
    """n, sum of x and sum of x x^T over feature vectors x, in float64."""

    count: Tensor
    total_D: Tensor
    outer_DD: Tensor

    @classmethod
    def of(cls, features_SD: Tensor) -> FeatureSums:
        """The sums of a batch of features, (S, D)."""
        x = features_SD.double()
        return cls(torch.tensor(float(len(x)), dtype=torch.float64), x.sum(0), x.T @ x)

    def __add__(self, other: FeatureSums) -> FeatureSums:
        return FeatureSums(self.count + other.count, self.total_D + other.total_D, self.outer_DD + other.outer_DD)

    def over_processes(self) -> FeatureSums:
        """The sums over all processes."""
        return FeatureSums(*(all_reduce_sum(x) for x in (self.count, self.total_D, self.outer_DD)))

    def moments(self) -> Moments:
        """Mean and covariance.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples; there are {int(self.count)}")
        mean = self.total_D / self.count
        return Moments(mean, (self.outer_DD - self.count * torch.outer(mean, mean)) / (self.count - 1))
