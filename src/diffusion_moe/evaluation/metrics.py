"""Mean, covariance and distances of features, and distances between images. All sums are in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributed import all_reduce_sum

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, KERNEL_SEED = 100, 1000, 2020
"""Subsets as torch-fidelity samples them, so that equal features give equal numbers."""
NEIGHBOURS = 3
SCORE_SPLIT = 5000
ROWS = 1000
"""Rows of features, or of a distance matrix, that are held at a time."""


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


def moments_of(features_SD: Tensor) -> Moments:
    """Mean and covariance of many features, summed over parts, so that no copy of all is made in float64."""
    first, *others = features_SD.split(ROWS)
    return sum((FeatureSums.of(part) for part in others), FeatureSums.of(first)).moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) between Gaussians of those moments (FID, arXiv 1706.08500, eq. 6).

    The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2), so no general matrix root is needed.

    Raises:
        ValueError: the moments are not finite, or not of one width.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(f"features of {len(a.mean_D)} and {len(b.mean_D)} numbers do not compare")
    if not all(torch.isfinite(x).all() for m in (a, b) for x in (m.mean_D, m.covariance_DD)):
        raise ValueError("the features' mean or covariance is not finite; look at the generated images")
    values, vectors = torch.linalg.eigh(a.covariance_DD)
    root_a = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ b.covariance_DD @ root_a
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    difference = a.mean_D - b.mean_D
    distance = difference @ difference + a.covariance_DD.trace() + b.covariance_DD.trace() - 2 * trace_root
    if not torch.isfinite(distance):
        raise ValueError("the Fréchet distance is not finite; look at the generated images")
    return float(distance)


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets, and how large each was."""

    mean: float
    std: float
    subset_size: int


def kernel_distance(
    generated_SD: Tensor,
    real_RD: Tensor,
    subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    seed: int = KERNEL_SEED,
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (KID, arXiv 1801.01401, section 4).

    Raises:
        ValueError: fewer than two images in a set.
    """
    size = min(subset_size, len(generated_SD), len(real_RD))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 images of each kind; there are {size}")
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = generated_SD[torch.from_numpy(random.choice(len(generated_SD), size, replace=False))].double()
        y = real_RD[torch.from_numpy(random.choice(len(real_RD), size, replace=False))].double()
        # Without the kernel of each feature with itself.
        within = sum(_kernel(z, z).fill_diagonal_(0).sum() for z in (x, y)) / (size * (size - 1))
        distances.append(float(within - 2 * _kernel(x, y).mean()))
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)), size)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1."""

    precision: float
    """Generated images within the real ones' manifold."""
    recall: float
    """Real images within the generated ones' manifold."""


def precision_recall(generated_SD: Tensor, real_RD: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991, eq. 1 to 3).

    A set's manifold is the union of balls about its features that reach to their `neighbours`-th nearest neighbour.

    Raises:
        ValueError: too few images for that many neighbours.
    """
    fewest = min(len(generated_SD), len(real_RD))
    if fewest <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} images of each kind; there are {fewest}")
    center = real_RD.double().mean(0)  # the same distances, with fewer digits lost in their sums
    generated, real = generated_SD.double() - center, real_RD.double() - center
    reach_S, reach_R = _reach(generated, neighbours), _reach(real, neighbours)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, reach in zip(generated.split(ROWS), reach_S.split(ROWS)):
        distances = _squared_distances(part, real)
        precise.append((distances <= reach_R).any(1))
        recalled |= (distances <= reach[:, None]).any(0)
    return PrecisionRecall(float(torch.cat(precise).double().mean()), float(recalled.double().mean()))


def _reach(features_SD: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each to its k-th nearest other one, (S,); the nearest of all is itself."""
    parts = [_squared_distances(part, features_SD) for part in features_SD.split(ROWS)]
    return torch.cat([part.kthvalue(neighbours + 1, dim=1).values for part in parts])


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return ((x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T).clamp(min=0)


def inception_score(logits_SC: Tensor, split: int = SCORE_SPLIT) -> float:
    """Mean over splits of exp(mean KL(p(y|x) || p(y))) (arXiv 1606.03498, section 4), in the order given."""
    scores = []
    for part in logits_SC.split(split):
        log_p = part.double().log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - np.log(len(log_p))
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_mean))
        scores.append(float(terms.sum(1).mean().exp()))
    return float(np.mean(scores))


def nearest_neighbour_distance(images: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance in pixel space of each image to its nearest reference image, (S,), float32.

    Args:
        images: NCHW, [-1, 1].
        reference: NCHW of the same size.
    """
    flat = reference.flatten(1)
    return torch.cat([torch.cdist(part.flatten(1), flat).min(dim=1).values for part in images.split(1024)])
