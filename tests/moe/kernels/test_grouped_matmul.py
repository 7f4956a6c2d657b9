"""The grouped matmul's kernels against loops over experts: results and all gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_moe.moe import backend
from diffusion_moe.moe.kernels import grouped_matmul
from diffusion_moe.moe.ops import gmm, gmm_loop, gmm_wgrad, gmm_wgrad_loop

COUNTS = {
    "empty in between": [34, 0, 0, 0, 19],
    "first and last empty": [0, 9, 17, 0],
    "one has all": [0, 0, 40, 0],
    "whole tiles": [16, 32, 0, 16],
    "around whole tiles": [15, 17, 1, 31],
    "one expert": [33],
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 rows and 32 columns, so that small operands have many."""
    monkeypatch.setattr(grouped_matmul, "ROWS", 16)
    monkeypatch.setattr(grouped_matmul, "LOW_PRECISION_ROWS", 16)
    monkeypatch.setattr(grouped_matmul, "COLUMNS", 32)
    monkeypatch.setattr(grouped_matmul, "DEPTH", 16)
    monkeypatch.setattr(grouped_matmul, "FEWEST_EXPERTS", 4)


def offsets(counts):
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)


def operands(counts, dim, width, dtype=torch.float32):
    x_AD, w_EDF, dy_AF = (
        torch.randn(shape).to(dtype).requires_grad_()
        for shape in ((sum(counts), dim), (len(counts), dim, width), (sum(counts), width))
    )
    return x_AD, w_EDF, dy_AF.detach(), offsets(counts)


def assert_equals_loop(counts, dim, width, dtype=torch.float32, rtol=1e-5, atol=1e-5):
    x_AD, w_EDF, dy_AF, offsets_E = operands(counts, dim, width, dtype)
    with backend.use("triton"):
        y_AF = gmm(x_AD, w_EDF, offsets_E)
        dx_AD, dw_EDF = torch.autograd.grad(y_AF, (x_AD, w_EDF), dy_AF)
    x, w, dy = (t.detach().float() for t in (x_AD, w_EDF, dy_AF))
    expected = (gmm_loop(x, w, offsets_E), gmm_loop(dy, w.mT, offsets_E), gmm_wgrad_loop(x, dy, offsets_E))
    for actual, wanted in zip((y_AF, dx_AD, dw_EDF), expected):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), wanted, rtol=rtol, atol=atol)
    empty_E = torch.tensor(counts) == 0
    assert torch.equal(dw_EDF[empty_E], torch.zeros_like(dw_EDF[empty_E]))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_the_loop(counts):
    assert_equals_loop(counts, 20, 40)


@pytest.mark.parametrize("widths", [(1, 1), (7, 5), (16, 32), (33, 65)], ids=str)
def test_any_widths(widths):
    assert_equals_loop([3, 0, 18], *widths)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 5, 15, 16, 17, 33]), min_size=1, max_size=6),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_counts(counts, widths):
    assert_equals_loop(counts, *widths)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=8),
    widths=st.tuples(st.integers(1, 80), st.integers(1, 80)),
)
def test_very_many_counts(counts, widths):
    assert_equals_loop(counts, *widths)


@pytest.mark.slow
def test_the_tiles_of_a_gpu(monkeypatch):
    monkeypatch.undo()
    assert_equals_loop([162, 0, 0, 0, 83], 40, 130, atol=1e-4)
    assert_equals_loop([162, 0, 0, 0, 83], 40, 130, torch.bfloat16, 2.0**-7, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_the_sums_and_nothing_before(dtype):
    """By one unit in the last place: the interpreter truncates to bfloat16 where a device rounds."""
    assert_equals_loop([18, 0, 5], 20, 40, dtype, torch.finfo(dtype).eps, 1e-4)


def test_more_experts_than_a_program_compares_at_a_time(monkeypatch):
    monkeypatch.setattr(grouped_matmul, "MOST_EXPERTS", 4)
    assert_equals_loop([0, 3, 0, 0, 17, 0, 1, 0, 0, 20, 0], 8, 8)


def test_any_layout():
    """Rows of stride zero, columns apart, matrices in every order, and one matrix for all."""
    offsets_E = offsets([3, 0, 18])
    x_AD, w_EDF = torch.randn(21, 20), torch.randn(3, 20, 24)
    rows = (
        x_AD,
        x_AD[:1].expand(21, 20),
        x_AD.T.contiguous().T,
        torch.randn(21, 40)[:, ::2],
        torch.randn(21, 28)[:, 4:24],
    )
    matrices = (
        w_EDF,
        w_EDF.mT.contiguous().mT,
        w_EDF[:1].expand(3, 20, 24),
        w_EDF.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    )
    with backend.use("triton"):
        for x, w in (*((x, w_EDF) for x in rows), *((x_AD, w) for w in matrices)):
            torch.testing.assert_close(gmm(x, w, offsets_E), gmm_loop(x, w, offsets_E), rtol=1e-5, atol=1e-5)
        for x in rows:
            y = x[:, :6] if x is not x_AD else x_AD
            torch.testing.assert_close(
                gmm_wgrad(x, y, offsets_E), gmm_wgrad_loop(x, y, offsets_E), rtol=1e-5, atol=1e-4
            )


def test_addresses_beyond_two_to_the_31():
    """Rows 2^27 elements apart, and matrices 2^30: 32 bits would not hold the last ones' addresses. Untouched memory is
    never made real."""
    memory = torch.empty(2**31 + 2**10, dtype=torch.float16)
    offsets_E = offsets([4, 5, 8])
    x_AD = memory.as_strided((17, 16), (2**27, 1)).normal_()
    w_EDF = torch.randn(3, 16, 8).half()
    with backend.use("triton"):
        for actual, expected in (
            (gmm(x_AD, w_EDF, offsets_E), gmm_loop(x_AD, w_EDF, offsets_E)),
            (gmm_wgrad(x_AD, x_AD, offsets_E), gmm_wgrad_loop(x_AD, x_AD, offsets_E)),
        ):
            torch.testing.assert_close(actual, expected, rtol=2.0**-9, atol=1e-2)
        rows = x_AD.contiguous()
        far_EDF = memory.as_strided((3, 16, 8), (2**30, 8, 1)).normal_()
        torch.testing.assert_close(
            gmm(rows, far_EDF, offsets_E), gmm_loop(rows, far_EDF, offsets_E), rtol=2.0**-9, atol=1e-2
        )


def test_neighbours_of_a_group_are_not_read():
    """NaN in other experts' rows and matrices reaches no result: 0 times NaN would."""
    x_AD, w_EDF, dy_AF, offsets_E = (t.detach() for t in operands([9, 12, 5], 20, 24))
    for rows, expert in ((slice(9), 0), (slice(21, None), 2)):
        x_AD[rows], w_EDF[expert], dy_AF[rows] = torch.nan, torch.nan, torch.nan
    with backend.use("triton"):
        y_AF, dw_EDF = gmm(x_AD, w_EDF, offsets_E), gmm_wgrad(x_AD, dy_AF, offsets_E)
    assert y_AF[9:21].isfinite().all() and y_AF[:9].isnan().all() and y_AF[21:].isnan().all()
    assert dw_EDF[1].isfinite().all() and dw_EDF[[0, 2]].isnan().all()


def test_rows_after_the_last_offset_belong_to_no_expert(monkeypatch):
    x_AD, w_EDF, _, offsets_E = operands([9, 20, 4, 40], 16, 32)
    offsets_E, w_EDF = offsets_E[:3], w_EDF[:3]  # what is behind them in memory would be one more expert
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options))
    y_AF = grouped_matmul.gmm(x_AD.detach(), w_EDF.detach(), offsets_E)
    torch.testing.assert_close(y_AF[:33], gmm_loop(x_AD.detach()[:33], w_EDF.detach(), offsets_E))
    assert y_AF[33:].isnan().all()


def test_no_rows_and_no_columns():
    with backend.use("triton"):
        for counts, dim, width in (([0, 0], 4, 5), ([3, 2], 4, 0), ([3, 2], 0, 4)):
            x_AD, w_EDF, dy_AF, offsets_E = operands(counts, dim, width)
            y_AF = gmm(x_AD, w_EDF, offsets_E)
            assert torch.equal(y_AF, torch.zeros(sum(counts), width))
            assert torch.equal(gmm_wgrad(x_AD, dy_AF, offsets_E), torch.zeros(w_EDF.shape))


@pytest.mark.parametrize("counts", [[162, *[0] * 14, 83], [0, 4], [4, 0], [0, 0, 7, 0]], ids=str)
def test_only_the_gradients_of_experts_without_rows_are_filled(counts, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "BLOCK", 16)  # several blocks an expert, the last not whole
    dw_EDF = torch.full((len(counts), 5, 7), torch.nan)
    grouped_matmul.zero_empty_(dw_EDF, offsets(counts))
    for gradient, count in zip(dw_EDF, counts):
        assert gradient.isnan().all() if count else torch.equal(gradient, torch.zeros(5, 7))


def test_keeps_the_operators_promises():
    x_AD, w_EDF, dy_AF, offsets_E = operands([3, 0, 5], 6, 7)
    with backend.use("triton"):
        torch.library.opcheck(gmm, (x_AD, w_EDF, offsets_E))
        torch.library.opcheck(gmm_wgrad, (x_AD, dy_AF, offsets_E))


@pytest.mark.parametrize(("allowed", "arithmetic"), [("tf32", "tf32"), ("ieee", "tf32x3"), ("none", "tf32x3")])
def test_torch_chooses_the_arithmetic_of_float32(allowed, arithmetic):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = allowed
    try:
        assert grouped_matmul.precision() == arithmetic
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
