"""`sort_by_expert` as a stable counting sort in three passes: count by block, sum the counts, write the rows.

Deterministic, because no pass uses atomics. Shape suffixes: A assignments, E experts, B blocks of L assignments each,
C blocks of a tile, N experts padded to a power of two.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device

TILE = 8192
"""Elements in a block's table of assignments and experts."""
MAX_BLOCK = 512
COLUMNS = 1024
"""Blocks whose counts are summed at a time."""


@triton.jit(do_not_specialize=["A", "B"])
def _count_by_block(expert, count_EB, A, B, E: tl.constexpr, L: tl.constexpr, N: tl.constexpr):
    """Count the assignments of each block to each expert."""
    block = tl.program_id(0)
    index_L, expert_N = block * L + tl.arange(0, L), tl.arange(0, N)
    expert_L = tl.load(expert + index_L, mask=index_L < A, other=N)
    count_N = tl.sum((expert_L[:, None] == expert_N[None, :]).to(tl.int32), axis=0)
    tl.store(count_EB + expert_N * B + block, count_N, mask=expert_N < E)


@triton.jit(do_not_specialize=["B"])
def _add_up_counts(count_EB, total_E, B, C: tl.constexpr):
    """Replace an expert's counts by those of all earlier blocks, and store its total."""
    row = count_EB + tl.program_id(0) * B
    total = tl.zeros((), dtype=tl.int32)
    for start in range(0, B, C):
        block_C = start + tl.arange(0, C)
        count_C = tl.load(row + block_C, mask=block_C < B, other=0)
        tl.store(row + block_C, total + tl.cumsum(count_C, axis=0) - count_C, mask=block_C < B)
        total += tl.sum(count_C, axis=0)
    tl.store(total_E + tl.program_id(0), total)


@triton.jit(do_not_specialize=["A", "B"])
def _place_assignments(
    expert, earlier_EB, total_E, order_A, row_A, offsets_E, A, B, E: tl.constexpr, L: tl.constexpr, N: tl.constexpr
):
    """Write the row of each assignment: after those of earlier experts, earlier blocks and earlier indices."""
    block = tl.program_id(0)
    index_L, expert_N = block * L + tl.arange(0, L), tl.arange(0, N)
    total_N = tl.load(total_E + expert_N, mask=expert_N < E, other=0).to(tl.int32)
    end_N = tl.cumsum(total_N, axis=0)
    if block == 0:
        tl.store(offsets_E + expert_N, end_N, mask=expert_N < E)
    first_N = end_N - total_N + tl.load(earlier_EB + expert_N * B + block, mask=expert_N < E, other=0)
    expert_L = tl.load(expert + index_L, mask=index_L < A, other=N)
    here_LN = (expert_L[:, None] == expert_N[None, :]).to(tl.int32)
    row_L = tl.sum(here_LN * (first_N[None, :] + tl.cumsum(here_LN, axis=0) - 1), axis=1)
    tl.store(row_A + index_L, row_L, mask=index_L < A)
    tl.store(order_A + row_L, index_L, mask=index_L < A)


def sort_by_expert(expert_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order_A, row_A, offsets_E and counts_E; see `routing.sort_by_expert`."""
    A, E, device = len(expert_A), num_experts, expert_A.device
    order_A, row_A = (torch.empty(A, dtype=torch.int64, device=device) for _ in range(2))
    if not A:
        return order_A, row_A, *(torch.zeros(E, dtype=dtype, device=device) for dtype in (torch.int32, torch.int64))
    offsets_E, total_E = (torch.empty(E, dtype=dtype, device=device) for dtype in (torch.int32, torch.int64))
    sizes = constants(E)
    blocks = triton.cdiv(A, sizes["L"])
    count_EB = torch.empty(E, blocks, dtype=torch.int32, device=device)
    expert_A = expert_A.contiguous()
    with on_device(expert_A):
        _count_by_block[(blocks,)](expert_A, count_EB, A, blocks, **sizes)
        _add_up_counts[(E,)](count_EB, total_E, blocks, C=COLUMNS)
        _place_assignments[(blocks,)](expert_A, count_EB, total_E, order_A, row_A, offsets_E, A, blocks, **sizes)
    return order_A, row_A, offsets_E, total_E


def constants(num_experts: int) -> dict[str, int]:
    """The constants that the kernels are compiled for: the number of experts, never that of assignments."""
    padded = triton.next_power_of_2(num_experts)
    return {"E": num_experts, "L": min(MAX_BLOCK, TILE // padded), "N": padded}
