"""Distances between sets of images or of their features."""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import FeatureSums


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) between Gaussians of those moments (FID, arXiv 1706.08500, eq. 6).

    The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2), so no general matrix root is needed.

    Raises:
        ValueError: the moments are not finite.
    """
    cov_a, cov_b = a.covariance(), b.covariance()
    if not (torch.isfinite(cov_a).all() and torch.isfinite(cov_b).all()):
        raise ValueError("the features' covariance is not finite; look at the generated images")
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ cov_b @ root_a
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    difference = a.mean() - b.mean()
    return float(difference @ difference + cov_a.trace() + cov_b.trace() - 2 * trace_root)


def nearest_neighbour_distance(images: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance in pixel space of each image to its nearest reference image, (S,), float32.

    Args:
        images: NCHW, [-1, 1]. reference: NCHW of the same size.
    """
    flat = reference.flatten(1)
    return torch.cat([torch.cdist(part.flatten(1), flat).min(dim=1).values for part in images.split(1024)])
