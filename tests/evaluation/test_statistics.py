"""Sums of features, and the moments they give."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_moe.evaluation.statistics import FeatureSums


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
