"""The sum of each token's rows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_moe.moe import backend
from diffusion_moe.moe.ops import combine


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=9), dim=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_number_of_rows_a_token(counts, dim, seed):
    """Against the sums in the same order, bit for bit."""
    rows = sum(counts)
    generator = torch.Generator().manual_seed(seed)
    y_AD, row_A = torch.randn(rows, dim, generator=generator), torch.randperm(rows, generator=generator)
    start_T = torch.tensor([0, *itertools.accumulate(counts)][:-1])
    with backend.use("triton"):
        out_TD = combine(y_AD, row_A, start_T)
    for token, (start, count) in enumerate(zip(start_T.tolist(), counts)):
        expected_D = torch.zeros(dim)
        for row in row_A[start : start + count].tolist():
            expected_D = expected_D + y_AD[row]
        assert torch.equal(out_TD[token], expected_D)


@pytest.mark.parametrize(("tokens", "per_token", "dim"), [(7, 3, 5), (2, 1, 2500), (3, 17, 8)])
def test_equal_numbers_of_rows(both, tokens, per_token, dim):
    """Unrolled, with columns in two blocks, and more rows than are unrolled."""
    y_AD, row_A = torch.randn(tokens * per_token, dim), torch.randperm(tokens * per_token)
    start_T = torch.arange(tokens) * per_token
    kernel, oracle = both(lambda: combine(y_AD, row_A, start_T, per_token))
    torch.testing.assert_close(kernel, oracle, rtol=1e-6, atol=1e-6)
    with backend.use("triton"):
        assert torch.equal(combine(y_AD, row_A, start_T), kernel), "the same without saying how many"


def test_sums_in_float32():
    """1 + 2^-8 + 2^-8 is lost when partial sums are rounded to bfloat16."""
    y_AD = torch.tensor([1.0, 2.0**-8, 2.0**-8])[:, None].to(torch.bfloat16)
    with backend.use("triton"):
        for per_token in (0, 3):
            out_TD = combine(y_AD, torch.tensor([2, 0, 1]), torch.tensor([0]), per_token)
            assert out_TD.dtype == torch.bfloat16 and out_TD.item() == 1 + 2.0**-7


def test_keeps_the_operators_promises():
    y_AD, row_A, start_T = torch.randn(6, 4), torch.randperm(6), torch.tensor([0, 2, 4])
    with backend.use("triton"):
        torch.library.opcheck(combine, (y_AD, row_A, start_T, 2))
        torch.library.opcheck(combine, (y_AD, row_A, start_T))
        assert torch.equal(combine(y_AD[:0], row_A[:0], torch.zeros(2, dtype=torch.int64)), torch.zeros(2, 4))
