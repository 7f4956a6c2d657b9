"""The counting sort against torch's stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_moe.moe import backend
from diffusion_moe.moe.routing import sort_by_expert


def assert_is_stable_sort(expert_A, num_experts):
    with backend.use("triton"):
        order_A, row_A, offsets_E, counts_E = sort_by_expert(expert_A, num_experts)
    expected_A = torch.sort(expert_A, stable=True).indices
    counts = torch.bincount(expert_A, minlength=num_experts)
    assert torch.equal(order_A, expected_A)
    assert torch.equal(row_A[order_A], torch.arange(len(expert_A)))
    assert torch.equal(counts_E, counts)
    assert torch.equal(offsets_E, counts.cumsum(0).to(torch.int32))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_assignments(data):
    num_experts = data.draw(st.integers(1, 9))
    experts = data.draw(st.lists(st.integers(0, num_experts - 1), max_size=40))
    assert_is_stable_sort(torch.tensor(experts, dtype=torch.int64), num_experts)


@pytest.mark.parametrize(("assignments", "num_experts"), [(512, 3), (513, 16), (1500, 48), (30, 257)])
def test_blocks(assignments, num_experts):
    """Exactly one block, just over, several; experts beyond a byte."""
    assert_is_stable_sort(torch.randint(num_experts, (assignments,)), num_experts)


def test_more_blocks_than_one_program_adds_up_at_a_time(monkeypatch):
    from diffusion_moe.moe.kernels import sort

    monkeypatch.setattr(sort, "TILE", 8)
    monkeypatch.setattr(sort, "COLUMNS", 4)
    assert_is_stable_sort(torch.randint(2, (101,)), 2)  # 26 blocks of 4, 4 at a time


def test_equals_torch_and_keeps_the_operators_promises(both):
    for expert_A in (torch.tensor([2, 0, 0, 3, 2, 3]), torch.full((9,), 3), torch.empty(0, dtype=torch.int64)):
        for kernel, oracle in zip(*both(lambda x=expert_A: sort_by_expert(x, 5))):
            assert kernel.dtype == oracle.dtype and torch.equal(kernel, oracle)
        with backend.use("triton"):
            torch.library.opcheck(sort_by_expert, (expert_A, 5))
