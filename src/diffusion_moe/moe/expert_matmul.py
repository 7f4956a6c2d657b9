"""The matmuls of rows with their experts' matrices: one grouped matmul, or one batched matmul for groups of one size.

Rows are permuted so that those of one expert are neighbours (see `routing.Routing`). Shape suffixes: A rows, C rows of
one expert, E experts, D and F widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .operators import run
from .ops import gmm, gmm_wgrad
from .routing import expert_of_rows

CAST_BLOCK = 2**23
"""Elements of weight gradients that are cast at a time on a CPU."""
ONES = 8
"""Columns of ones whose matmul gives sums of rows; as many as grouped_mm's alignment asks for."""


class GroupedMatmul:
    """One grouped matmul, for any number of rows an expert (token choice).

    Args:
        offsets_E: end of each expert's rows (see `Routing`).
    """

    def __init__(self, offsets_E: Tensor) -> None:
        self.offsets_E = offsets_E

    def matmul(self, x_AD: Tensor, w_EDF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        """Every row times its expert's matrix, plus its expert's bias, (A, F)."""
        y_AF = run(gmm, x_AD, w_EDF, self.offsets_E)
        if bias_EF is not None:
            y_AF += bias_EF.index_select(0, expert_of_rows(x_AD, self.offsets_E))
        return y_AF

    def weight_gradient(self, x_AD: Tensor, dy_AF: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of `matmul` in the matrices, (E, D, F), cast to `dtype`."""
        if dtype == x_AD.dtype or not _is_on_host(self.offsets_E):
            return run(gmm_wgrad, x_AD, dy_AF, self.offsets_E).to(dtype)
        dw_EDF = x_AD.new_empty(len(self.offsets_E), x_AD.shape[1], dy_AF.shape[1], dtype=dtype)
        starts = [0, *self.offsets_E.tolist()]
        for experts in _cast_blocks(dw_EDF):
            rows = slice(starts[experts.start], starts[experts.stop])
            offsets = self.offsets_E[experts] - rows.start
            dw_EDF[experts] = run(gmm_wgrad, x_AD[rows], dy_AF[rows], offsets)
        return dw_EDF

    def row_sums(self, y_AF: Tensor) -> Tensor:
        """The sum of each expert's rows, (E, F)."""
        return run(gmm_wgrad, y_AF.new_ones(len(y_AF), ONES), y_AF, self.offsets_E)[:, 0]


class BatchedMatmul(GroupedMatmul):
    """One batched matmul, where every expert has the same number of rows (expert choice)."""

    def matmul(self, x_AD: Tensor, w_EDF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        x_ECD = self._by_expert(x_AD)
        y_ECF = x_ECD.bmm(w_EDF) if bias_EF is None else torch.baddbmm(bias_EF[:, None], x_ECD, w_EDF)
        return y_ECF.flatten(0, 1)

    def weight_gradient(self, x_AD: Tensor, dy_AF: Tensor, dtype: torch.dtype) -> Tensor:
        x_EDC = self._by_expert(x_AD).transpose(1, 2)
        dy_ECF = self._by_expert(dy_AF)
        if dtype == x_AD.dtype or x_AD.device.type != "cpu":
            return x_EDC.bmm(dy_ECF).to(dtype)
        dw_EDF = x_AD.new_empty(len(x_EDC), x_EDC.shape[1], dy_ECF.shape[2], dtype=dtype)
        for experts in _cast_blocks(dw_EDF):
            dw_EDF[experts] = x_EDC[experts].bmm(dy_ECF[experts])
        return dw_EDF

    def row_sums(self, y_AF: Tensor) -> Tensor:
        return self._by_expert(y_AF).sum(1)

    def _by_expert(self, x_AD: Tensor) -> Tensor:
        """(A, D) to (E, C, D)."""
        E = len(self.offsets_E)
        return x_AD.view(E, len(x_AD) // E, x_AD.shape[1])


class ExpertBias(torch.autograd.Function):
    """The bias of each row's expert, (A, F). Its gradient is a grouped matmul, so nothing is added by atomics."""

    @staticmethod
    def forward(ctx: Any, bias_EF: Tensor, offsets_E: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(offsets_E)
        return bias_EF.index_select(0, expert_of_rows(bias_EF.new_empty(num_rows), offsets_E))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_AF: Tensor) -> tuple[Tensor | None, ...]:
        (offsets_E,) = ctx.saved_tensors
        return GroupedMatmul(offsets_E).row_sums(drows_AF.contiguous()), None, None


def _is_on_host(offsets_E: Tensor) -> bool:
    """True where the host can read the offsets without waiting for a device; false while a graph is traced."""
    return offsets_E.device.type == "cpu" and type(offsets_E) is Tensor and not torch.compiler.is_compiling()


def _cast_blocks(dw_EDF: Tensor) -> Iterator[slice]:
    """Slices of a few experts, so that gradients of all experts never exist in two dtypes at once."""
    size = max(1, CAST_BLOCK // dw_EDF[0].numel())
    for start in range(0, len(dw_EDF), size):
        yield slice(start, min(start + size, len(dw_EDF)))
