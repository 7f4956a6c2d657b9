"""The ways to multiply rows by their experts' matrices, against sums written out here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_moe.moe import expert_matmul as matmuls
from diffusion_moe.moe.expert_matmul import Batched, Grouped, Sorted, alike, products_of

UNEVEN = [5, 0, 9, 8, 17, 6, 0, 8]
EVEN = [6] * 5


def offsets(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def ways(counts):
    """Every way that can multiply so many rows an expert."""
    found = [Grouped(offsets(counts)), Sorted(offsets(counts), list(alike(counts, 3)))]
    return found + [Batched(offsets(counts))] * (len(set(counts)) == 1)


CASES = [pytest.param(counts, i, id=f"{way.__class__.__name__} of {name}")
         for name, counts in (("even", EVEN), ("uneven", UNEVEN)) for i, way in enumerate(ways(counts))]  # fmt: skip


def rows_of(way, values_AD):
    """Rows as the matmuls have them; a row that is filled in is a copy of the first, as the layer's gathers are."""
    A = len(values_AD)
    return values_AD.index_select(0, way.spread(torch.arange(A)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("counts", "which"), CASES)
def test_every_way_is_the_product_of_each_row_with_its_experts_matrix(counts, which, dtype):
    A, E, D, F = sum(counts), len(counts), 8, 16
    way = ways(counts)[which]
    x_AD, w_EDF, b_EF = torch.randn(A, D).to(dtype), torch.randn(E, D, F).to(dtype), torch.randn(E, F).to(dtype)
    expert_A = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    expected = torch.einsum("ad,adf->af", x_AD.double(), w_EDF.double()[expert_A])
    rows = way.places(torch.arange(A))
    tolerance = {"rtol": 2.0**-7, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}
    for bias, more in ((None, 0), (way.cast(b_EF, dtype), b_EF.double()[expert_A])):
        actual = way.product(rows_of(way, x_AD), way.cast(w_EDF, dtype), bias)[rows]
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected + more, **tolerance)
    back = way.product(rows_of(way, expected.to(dtype)), way.cast(w_EDF, dtype).transpose(1, 2))[rows]
    expected_back = torch.einsum("af,adf->ad", expected.to(dtype).double(), w_EDF.double()[expert_A])
    torch.testing.assert_close(back.double(), expected_back, **{**tolerance, "atol": 5 * tolerance["atol"]})


@pytest.mark.parametrize("block", [1, 2 * 8 * 16, 10**9])
@pytest.mark.parametrize(("dtype", "wide"), [(torch.float64,) * 2, (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize(("counts", "which"), CASES)
def test_every_ways_gradient_of_the_matrices_and_sums(counts, which, dtype, wide, block, monkeypatch):
    """Rows that are filled in bring zeros on one side, as weights of 0 make them, and whatever on the other."""
    monkeypatch.setattr(matmuls, "CAST_BLOCK", block)
    A, E, D, F = sum(counts), len(counts), 8, 16
    way = ways(counts)[which]
    x_AD, y_AF = torch.randn(A, D).to(dtype), torch.randn(A, F).to(dtype)
    member_AE = torch.nn.functional.one_hot(
        torch.repeat_interleave(torch.arange(E), torch.tensor(counts)), num_classes=E
    ).double()
    y_PF = torch.stack([way.spread(column) for column in y_AF.unbind(1)], 1)
    assert y_PF.count_nonzero() == y_AF.count_nonzero()
    dw_EDF, sum_EF = way.wgrad(rows_of(way, x_AD), y_PF, wide), way.sums(y_PF)
    assert dw_EDF.dtype == wide
    tolerance = {"rtol": 2.0**-7, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}
    expected = torch.einsum("ae,ad,af->edf", member_AE, x_AD.double(), y_AF.double())
    torch.testing.assert_close(dw_EDF.double(), expected, **tolerance)
    torch.testing.assert_close(sum_EF.double(), member_AE.T @ y_AF.double(), **tolerance)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=12), largest=st.integers(1, 5))
def test_batches_hold_every_expert_once_with_little_filled_in(counts, largest):
    batches = list(alike(counts, largest))
    assert sorted(e for experts, _ in batches for e in experts) == list(range(len(counts)))
    for experts, rows in batches:
        most = max(counts[e] for e in experts)
        assert len(experts) <= largest and most <= rows < most + matmuls.MULTIPLE and rows % matmuls.MULTIPLE == 0
        # Before the last expert came there was room for it; it brings no more than the share of those before.
        assert sum(most - counts[e] for e in experts) <= matmuls.MAX_FILLED * most * (len(experts) - 1)
    way = Sorted(offsets(counts), batches)
    A = sum(counts)
    values = torch.rand(A) + 1
    spread = way.spread(values)
    assert torch.equal(way.collect(spread), values) and spread.count_nonzero() == A
    assert torch.equal(way.places(torch.arange(A)), way.place_A)
    expert_P = torch.cat([torch.tensor(experts).repeat_interleave(rows) for experts, rows in batches])
    assert torch.equal(expert_P[way.place_A], torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))


def chosen(counts, numbers=64, equal=False, dtype=torch.bfloat16):
    return type(products_of(offsets(counts), sum(counts), equal, numbers, dtype))


def test_experts_share_products_where_many_have_about_as_many_rows_and_not_too_many(monkeypatch):
    alike_rows = [100, 99, 98, 97, 100, 99, 98, 97]
    assert chosen([6] * 4, equal=True) is Batched
    assert chosen(alike_rows) is Sorted
    assert chosen(alike_rows, dtype=torch.float32) is Grouped
    assert chosen([1, 2, 4, 8, 16, 32, 64, 128]) is Grouped  # no two alike
    assert chosen(alike_rows[:3]) is Grouped  # fewer than four a product
    assert chosen([0, 0, 0, 0]) is Sorted
    assert chosen(alike_rows, numbers=matmuls.MAX_NUMBERS // 4) is Sorted
    assert chosen(alike_rows, numbers=matmuls.MAX_NUMBERS // 3) is Grouped  # no more than three share one
    monkeypatch.setattr(matmuls, "MAX_ROWS", 98.5)  # as many as they have
    assert chosen(alike_rows) is Sorted
    assert chosen([*alike_rows[:-1], 98]) is Grouped


def test_whoever_has_to_wait_for_the_counts_groups():
    counts = torch.full((8,), 10).cumsum(0).to(torch.int32)
    assert type(products_of(counts, 80, False, 64, torch.bfloat16)) is Sorted
    assert type(products_of(counts.to("meta"), 80, False, 64, torch.bfloat16)) is Grouped
    with torch._subclasses.FakeTensorMode() as mode:
        assert type(products_of(mode.from_tensor(counts), 80, False, 64, torch.bfloat16)) is Grouped
    seen = []

    def traced(x):
        seen.append(type(products_of(counts, 80, False, 64, torch.bfloat16)).__name__)
        return x + 1

    torch.compile(traced, backend="eager")(torch.ones(1))
    assert seen == ["Grouped"]


def test_a_grouped_product_asks_nothing_of_a_host_that_would_wait(monkeypatch):
    monkeypatch.setattr(matmuls, "_known_on_host", lambda offsets_E: False)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    way = products_of(offsets([8] * 4), 32, False, 64, torch.bfloat16)
    x, y, w = torch.randn(32, 8).bfloat16(), torch.randn(32, 16).bfloat16(), torch.randn(4, 8, 16)
    assert type(way) is Grouped and way.product(x, way.cast(w, x.dtype)).shape == (32, 16)
    dw = way.wgrad(x, y, torch.float32)
    expected = x.float().view(4, 8, 8).transpose(1, 2) @ y.float().view(4, 8, 16)
    torch.testing.assert_close(dw, expected, rtol=2.0**-7, atol=0.05)
    torch.testing.assert_close(way.sums(y).float(), y.float().view(4, 8, 16).sum(1), rtol=2.0**-7, atol=0.05)
