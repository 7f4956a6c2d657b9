"""Distances against closed forms, plain loops and independent implementations."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from diffusion_moe.evaluation import metrics
from diffusion_moe.evaluation.metrics import (
    FeatureSums,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbour_distance,
    precision_recall,
)


def moments(x):
    """Of features."""
    return FeatureSums.of(x).moments()


def test_sums_give_numpys_mean_and_covariance():
    x = torch.randn(50, 7) * 3 + 100
    moments = FeatureSums.of(x).moments()
    np.testing.assert_allclose(moments.mean_D, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance_DD, np.cov(x.double().numpy(), rowvar=False), rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=5))
def test_sums_add_up_over_any_batches(cuts):
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    edges = [0, *sorted(cuts), 50]
    parts = [FeatureSums.of(x[start:stop]) for start, stop in itertools.pairwise(edges)]
    whole = FeatureSums.of(x)
    covariance, expected = (sums.moments().covariance_DD for sums in (sum(parts[1:], parts[0]), whole))
    torch.testing.assert_close(covariance, expected, rtol=1e-12, atol=1e-12)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 samples; there are 1"):
        FeatureSums.of(torch.randn(1, 3)).moments()


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = moments(torch.randn(100, 6))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_shifted_and_scaled_sets():
    """Scaling a set by s about its mean and moving it by d: |d|^2 + (s - 1)^2 tr(cov)."""
    x = torch.randn(200, 5, dtype=torch.float64)
    move = torch.arange(5.0, dtype=torch.float64)
    y = (x - x.mean(0)) * 1.7 + x.mean(0) + move
    expected = float(move @ move + 0.7**2 * moments(x).covariance_DD.trace())
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_frechet_distance_of_gaussians_with_common_axes(seed, width):
    """Covariances that commute: |d|^2 + sum of (sqrt(a) - sqrt(b))^2 over their eigenvalues; the same both ways."""
    generator = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    a, b, d = torch.rand(3, width, dtype=torch.float64, generator=generator)
    one = Moments(torch.zeros(width, dtype=torch.float64), axes @ torch.diag(a) @ axes.T)
    other = Moments(d, axes @ torch.diag(b) @ axes.T)
    expected = float(d @ d + ((a.sqrt() - b.sqrt()) ** 2).sum())
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("samples", [300, 5])
def test_frechet_distance_equals_scipys_matrix_root(samples):
    """Also for covariances without full rank."""
    a, b = torch.randn(samples, 8).double(), (torch.randn(samples, 8) @ torch.randn(8, 8)).double()
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_refuses_what_is_not_finite_or_of_another_width():
    x = torch.randn(10, 3)
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(moments(x), moments(torch.randn(10, 3)))
    with pytest.raises(ValueError, match="features of 3 and 4 numbers do not compare"):
        frechet_distance(moments(torch.randn(9, 3)), moments(torch.randn(9, 4)))


def test_kernel_distance_equals_plain_loops_and_scikit_learns_kernel():
    x, y = torch.randn(9, 5), torch.randn(9, 5) + 1
    found = kernel_distance(x, y, subsets=1, subset_size=9)

    def k(a, b):
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    within = sum(k(s[i], s[j]) for s in (x, y) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    between = sum(k(a, b) for a in x for b in y) / 81
    assert found.mean == pytest.approx(within - 2 * between, rel=1e-12)
    kernels = [polynomial_kernel(*pair, degree=3, coef0=1) for pair in ((x, x), (y, y), (x, y))]
    sklearns = sum((m.sum() - np.trace(m)) / 72 for m in kernels[:2]) - 2 * kernels[2].mean()
    assert found.mean == pytest.approx(sklearns, rel=1e-5)
    assert (found.std, found.subset_size) == (0, 9)


def test_kernel_distance_is_unbiased_and_grows_with_the_shift():
    """Sets of one distribution: zero within its own uncertainty. Shifted ones: the kernel's exact expectation.

    (1 + u)^3 = 1 + 3 u + 3 u^2 + u^3 with u = x y, and moments of N(d, 1): d, 1 + d^2, 3 d + d^3.
    """
    x, y = torch.randn(40_000, 1), torch.randn(40_000, 1)
    same = kernel_distance(x, y, subsets=40)
    assert abs(same.mean) < 4 * same.std / 40**0.5
    d = 0.5
    second, third = 1 + d**2, 3 * d + d**3
    shifted = 1 + 3 * d**2 + 3 * second**2 + third**2
    expected = (1 + 3) + shifted - 2 * (1 + 3 * second)
    found = kernel_distance(x, y + d, subsets=40)
    assert found.mean == pytest.approx(expected, abs=4 * found.std / 40**0.5)
    assert kernel_distance(x, y, subsets=3) == kernel_distance(x, y, subsets=3) != kernel_distance(x, y, 3, seed=1)
    with pytest.raises(ValueError, match="at least 2 images of each kind; there are 1"):
        kernel_distance(x[:1], y)


def test_precision_and_recall_of_constructed_sets():
    """On a line: balls of the real points 0 to 9 reach their 3rd neighbour; 2 of 4 generated points lie in them."""
    real, generated = torch.arange(10.0)[:, None], torch.tensor([[4.5], [8.0], [30.0], [50.0]])
    found = precision_recall(generated, real)
    # The generated points reach 45.5, 42, 25.5 and 45.5 far: every real point lies in some ball.
    assert found == (0.5, 1.0)
    far = precision_recall(generated + 1000, real)
    assert far == (0.0, 0.0)
    assert precision_recall(real, real) == (1.0, 1.0)
    # One tight group within the real points: precise, but it covers the points next to it alone.
    tight = torch.tensor([[4.9], [5.0], [5.0], [5.1]])
    assert precision_recall(tight, real) == (1.0, 0.1)
    with pytest.raises(ValueError, match="more than 3 images of each kind; there are 3"):
        precision_recall(real[:3], real)


@pytest.mark.parametrize("rows", [7, 1000])
def test_precision_and_recall_equal_scikit_learns_neighbours(monkeypatch, rows):
    monkeypatch.setattr(metrics, "ROWS", rows)
    real, generated = torch.randn(60, 4, dtype=torch.float64), 0.8 * torch.randn(45, 4, dtype=torch.float64) + 0.5

    def reach(x):
        return NearestNeighbors(n_neighbors=4).fit(x.numpy()).kneighbors(x.numpy())[0][:, -1]

    distances = torch.cdist(generated, real, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    precision = (distances <= reach(real)).any(1).mean()
    recall = (distances <= reach(generated)[:, None]).any(0).mean()
    found = precision_recall(generated, real)
    assert found == (pytest.approx(precision), pytest.approx(recall))
    assert 0.2 < found.recall < found.precision < 1


def test_inception_score_of_known_distributions():
    """All alike: 1. Certain and even over C classes: C. A mixture: exp of the mean KL, computed by hand."""
    assert inception_score(torch.randn(1, 6).expand(40, 6)) == pytest.approx(1)
    certain = torch.full((60, 6), -torch.inf)
    certain[torch.arange(60), torch.arange(60) % 6] = 0
    assert inception_score(certain) == pytest.approx(6)
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    mean = p.mean(0)
    by_hand = math.exp((p * np.log(p / mean)).sum(1).mean())
    assert inception_score(torch.from_numpy(p).log() + 3.0) == pytest.approx(by_hand)
    # Splits in order, the last one smaller: 3 of one class, then 1 of another, each of them alone worth 1.
    assert inception_score(certain[[0, 0, 0, 1]], split=3) == pytest.approx(1)
    assert inception_score(certain[[0, 1, 2, 0, 0]], split=3) == pytest.approx((3 + 1) / 2)


def test_metrics_equal_torch_fidelitys_on_the_same_features(fidelity):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = torch.randn(300, 16).double(), (torch.randn(250, 16) @ torch.randn(16, 16) * 0.3).double()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(generated), fid_features_to_statistics(real), False)
    ours = frechet_distance(moments(generated), moments(real))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    theirs = kid_features_to_metric(
        generated, real, kid_subsets=20, kid_subset_size=100, rng_seed=2020, kid_kernel="poly", verbose=False
    )
    kernel = kernel_distance(generated, real, subsets=20, subset_size=100)
    assert kernel.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert kernel.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=3, save_cpu_ram=False, verbose=False)
    assert precision_recall(generated, real) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert theirs["precision"] != theirs["recall"]
    logits = 3 * torch.randn(200, 10)
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)
    assert inception_score(logits, split=50) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_nearest_neighbour_distance_equals_a_plain_loop():
    images, reference = torch.randn(7, 1, 3, 3), torch.randn(11, 1, 3, 3)
    expected = [min(float((image - other).norm()) for other in reference) for image in images]
    torch.testing.assert_close(nearest_neighbour_distance(images, reference), torch.tensor(expected))
    assert nearest_neighbour_distance(reference[3:4], reference).item() == pytest.approx(0, abs=1e-3)
