"""Grouped and batched matmuls of rows with their experts' matrices, against sums written out here."""

import pytest
import torch

from diffusion_moe.moe import expert_matmul
from diffusion_moe.moe.expert_matmul import BatchedMatmul, GroupedMatmul

UNEVEN = [5, 0, 9, 8, 17, 6, 0, 8]
EVEN = [6] * 5
CASES = [(GroupedMatmul, EVEN), (GroupedMatmul, UNEVEN), (BatchedMatmul, EVEN)]
IDS = ["grouped, even", "grouped, uneven", "batched, even"]


def offsets(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def tolerance(dtype):
    return {"rtol": 2.0**-7, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "counts"), CASES, ids=IDS)
def test_every_row_is_multiplied_by_its_experts_matrix(kind, counts, dtype):
    A, E, D, F = sum(counts), len(counts), 8, 16
    experts = kind(offsets(counts))
    x_AD, w_EDF, b_EF = torch.randn(A, D).to(dtype), torch.randn(E, D, F).to(dtype), torch.randn(E, F).to(dtype)
    expert_A = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    expected = torch.einsum("ad,adf->af", x_AD.double(), w_EDF.double()[expert_A])
    for bias, more in ((None, 0), (b_EF, b_EF.double()[expert_A])):
        actual = experts.matmul(x_AD, w_EDF, bias)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected + more, **tolerance(dtype))
    back = experts.matmul(expected.to(dtype), w_EDF.transpose(1, 2))
    expected_back = torch.einsum("af,adf->ad", expected.to(dtype).double(), w_EDF.double()[expert_A])
    torch.testing.assert_close(
        back.double(), expected_back, **{**tolerance(dtype), "atol": 5 * tolerance(dtype)["atol"]}
    )


@pytest.mark.parametrize("block", [1, 2 * 8 * 16, 10**9])
@pytest.mark.parametrize(("dtype", "asked"), [(torch.float64,) * 2, (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize(("kind", "counts"), CASES, ids=IDS)
def test_gradient_of_the_matrices_and_sums_of_rows(kind, counts, dtype, asked, block, monkeypatch):
    monkeypatch.setattr(expert_matmul, "CAST_BLOCK", block)
    A, E, D, F = sum(counts), len(counts), 8, 16
    experts = kind(offsets(counts))
    x_AD, y_AF = torch.randn(A, D).to(dtype), torch.randn(A, F).to(dtype)
    member_AE = torch.nn.functional.one_hot(
        torch.repeat_interleave(torch.arange(E), torch.tensor(counts)), num_classes=E
    ).double()
    dw_EDF, sum_EF = experts.weight_gradient(x_AD, y_AF, asked), experts.row_sums(y_AF)
    assert dw_EDF.dtype == asked
    expected = torch.einsum("ae,ad,af->edf", member_AE, x_AD.double(), y_AF.double())
    torch.testing.assert_close(dw_EDF.double(), expected, **tolerance(dtype))
    torch.testing.assert_close(sum_EF.double(), member_AE.T @ y_AF.double(), **tolerance(dtype))


@pytest.mark.parametrize("where", ["another device", "a fake tensor", "a traced graph"])
def test_offsets_are_read_on_the_host_only_where_that_needs_no_wait(where):
    counts = offsets([10] * 8)
    assert expert_matmul._is_on_host(counts)
    if where == "another device":
        assert not expert_matmul._is_on_host(counts.to("meta"))
    elif where == "a fake tensor":
        with torch._subclasses.FakeTensorMode() as mode:
            assert not expert_matmul._is_on_host(mode.from_tensor(counts))
    else:
        seen = []

        def traced(x):
            seen.append(expert_matmul._is_on_host(counts))
            return x + 1

        torch.compile(traced, backend="eager")(torch.ones(1))
        assert seen == [False]


def test_a_grouped_matmul_never_makes_the_host_wait(monkeypatch):
    monkeypatch.setattr(expert_matmul, "_is_on_host", lambda offsets_E: False)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    experts = GroupedMatmul(offsets([8] * 4))
    x, y, w = torch.randn(32, 8).bfloat16(), torch.randn(32, 16).bfloat16(), torch.randn(4, 8, 16).bfloat16()
    assert experts.matmul(x, w).shape == (32, 16)
    dw = experts.weight_gradient(x, y, torch.float32)
    expected = x.float().view(4, 8, 8).transpose(1, 2) @ y.float().view(4, 8, 16)
    torch.testing.assert_close(dw, expected, rtol=2.0**-7, atol=0.05)
    torch.testing.assert_close(experts.row_sums(y).float(), y.float().view(4, 8, 16).sum(1), rtol=2.0**-7, atol=0.05)
