"""Distances against closed forms and independent implementations."""

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.evaluation import features
from diffusion_moe.evaluation.metrics import frechet_distance, nearest_neighbour_distance
from diffusion_moe.evaluation.statistics import FeatureSums


def test_sums_give_numpys_mean_and_covariance():
    x = torch.randn(50, 7) * 3 + 100
    sums = FeatureSums.of(x)
    np.testing.assert_allclose(sums.mean(), x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(sums.covariance(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-8)


def test_sums_add_up_over_batches():
    x = torch.randn(50, 7)
    parts = FeatureSums.of(x[:13]) + FeatureSums.of(x[13:14]) + FeatureSums.of(x[14:])
    whole = FeatureSums.of(x)
    torch.testing.assert_close(parts.covariance(), whole.covariance(), rtol=1e-12, atol=1e-12)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 samples; there are 1"):
        FeatureSums.of(torch.randn(1, 3)).covariance()


def test_frechet_distance_of_a_set_to_itself_is_zero():
    sums = FeatureSums.of(torch.randn(100, 6))
    assert frechet_distance(sums, sums) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_shifted_and_scaled_sets():
    """Scaling a set by s about its mean and moving it by d: |d|^2 + (s - 1)^2 tr(cov)."""
    x = torch.randn(200, 5, dtype=torch.float64)
    move = torch.arange(5.0, dtype=torch.float64)
    y = (x - x.mean(0)) * 1.7 + x.mean(0) + move
    expected = float(move @ move + 0.7**2 * FeatureSums.of(x).covariance().trace())
    assert frechet_distance(FeatureSums.of(x), FeatureSums.of(y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [300, 5])
def test_frechet_distance_equals_scipys_matrix_root(samples):
    """Also for covariances without full rank."""
    a, b = torch.randn(samples, 8).double(), (torch.randn(samples, 8) @ torch.randn(8, 8)).double()
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(FeatureSums.of(a), FeatureSums.of(b)) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_refuses_features_that_are_not_finite():
    x = torch.randn(10, 3)
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(FeatureSums.of(x), FeatureSums.of(torch.randn(10, 3)))


def test_nearest_neighbour_distance_equals_a_plain_loop():
    images, reference = torch.randn(7, 1, 3, 3), torch.randn(11, 1, 3, 3)
    expected = [min(float((image - other).norm()) for other in reference) for image in images]
    torch.testing.assert_close(nearest_neighbour_distance(images, reference), torch.tensor(expected))
    assert nearest_neighbour_distance(reference[3:4], reference).item() == pytest.approx(0, abs=1e-3)


def test_the_classifier_reads_held_out_digits_and_is_a_function_of_its_seed(monkeypatch):
    monkeypatch.setattr(features, "EPOCHS", 12)
    training, test = load_dataset(DataConfig(), "train"), load_dataset(DataConfig(), "test").everything()
    one, again, other = (features.train_classifier(training, seed) for seed in (0, 0, 1))
    assert (one.judge(test.images)[1] == test.labels).float().mean() > 0.96
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


def test_moving_images_keeps_their_background_and_most_of_their_ink():
    images = load_dataset(DataConfig(), "test").everything().images
    moved = features._moved(images)
    assert moved.amin() >= -1
    assert (moved + 1).sum().item() == pytest.approx((images + 1).sum().item(), rel=0.1)
    assert (moved - images).abs().mean() > 0.05
