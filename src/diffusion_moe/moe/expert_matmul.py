"""How rows meet their experts' matrices: in a grouped product, in one batched product, or in several.

Experts with as many rows each are one batched product. Others are one grouped product; but that is a product an expert
on a CPU, which in bfloat16 costs tens of microseconds whatever its size. There experts with about as many rows share a
batched product: they are sorted by their rows, and the few that are missing are filled in with weight 0. Shape suffixes
as in `experts.py`, P rows with those filled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import gmm, gmm_wgrad
from .routing import expert_of_rows

CAST_BLOCK = 2**23
"""Numbers in a block of gradients that is cast at a time on a CPU."""
MAX_ROWS = 1024
"""Rows that experts may have on average to share products: with more, a product an expert costs little beside."""
MAX_BYTES = 2
"""Of a number, for experts to share products: in float32 a product an expert costs little beside, and no cast sorts the
experts on its way (docs/log.md)."""
MAX_NUMBERS = 2**22
"""Numbers in the matrices of the first projection that share a product."""
MAX_FILLED = 1 / 16
"""Rows filled in, as a share of a batched product's."""
MIN_EXPERTS = 4
"""Experts a batched product, on average, that make sorting and filling worth their while."""
MULTIPLE = 8
"""Of which an expert's rows in a batched product are one: a product is compiled for every number (docs/log.md)."""
ONES = 8
"""Columns of ones whose product gives sums of rows; as many as grouped_mm's alignment asks for."""


class Grouped:
    """One grouped product; rows and experts as they are."""

    def __init__(self, offsets_E: Tensor) -> None:
        self.offsets_E = offsets_E

    def spread(self, values_A: Tensor) -> Tensor:
        """Values of the routing's rows as the products have them, (P,); 0 where a row is filled in."""
        return values_A

    def collect(self, values_P: Tensor) -> Tensor:
        """The reverse of `spread`, (A,)."""
        return values_P

    def places(self, row_A: Tensor) -> Tensor:
        """Where the products have these rows of the routing."""
        return row_A

    def cast(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """Matrices (or biases) in the products' dtype and order of the experts."""
        return w.to(dtype)

    def product(self, x_PD: Tensor, w_EDF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        """Every row times its expert's matrix, (P, F). w_EDF, bias_EF: see `cast`."""
        y_PF = gmm(x_PD, w_EDF, self.offsets_E)
        if bias_EF is not None:
            y_PF += bias_EF.index_select(0, expert_of_rows(x_PD, self.offsets_E))
        return y_PF

    def wgrad(self, x_PD: Tensor, y_PF: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient of `product` in the matrices as they were before `cast`, (E, D, F), in that dtype."""
        if dtype == x_PD.dtype or not _known_on_host(self.offsets_E):
            return gmm_wgrad(x_PD, y_PF, self.offsets_E).to(dtype)
        wide_EDF = x_PD.new_empty(len(self.offsets_E), x_PD.shape[1], y_PF.shape[1], dtype=dtype)
        starts = [0, *self.offsets_E.tolist()]
        for experts in _cast_blocks(wide_EDF):
            rows = slice(starts[experts.start], starts[experts.stop])
            wide_EDF[experts] = gmm_wgrad(x_PD[rows], y_PF[rows], self.offsets_E[experts] - rows.start)
        return wide_EDF

    def sums(self, y_PF: Tensor) -> Tensor:
        """The sum of each expert's rows, (E, F)."""
        return gmm_wgrad(y_PF.new_ones(len(y_PF), ONES), y_PF, self.offsets_E)[:, 0]


class Batched(Grouped):
    """One batched product: all experts have as many rows."""

    def product(self, x_PD: Tensor, w_EDF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        x_ECD = _by_expert(x_PD, len(w_EDF))
        y_ECF = x_ECD.bmm(w_EDF) if bias_EF is None else torch.baddbmm(bias_EF[:, None], x_ECD, w_EDF)
        return y_ECF.flatten(0, 1)

    def wgrad(self, x_PD: Tensor, y_PF: Tensor, dtype: torch.dtype) -> Tensor:
        x_EDC, y_ECF = _by_expert(x_PD, len(self.offsets_E)).transpose(1, 2), _by_expert(y_PF, len(self.offsets_E))
        if dtype == x_PD.dtype or x_PD.device.type != "cpu":
            return x_EDC.bmm(y_ECF).to(dtype)
        wide_EDF = x_PD.new_empty(len(x_EDC), x_EDC.shape[1], y_ECF.shape[2], dtype=dtype)
        for experts in _cast_blocks(wide_EDF):
            wide_EDF[experts] = x_EDC[experts].bmm(y_ECF[experts])
        return wide_EDF

    def sums(self, y_PF: Tensor) -> Tensor:
        return _by_expert(y_PF, len(self.offsets_E)).sum(1)


class Batch(NamedTuple):
    """Experts of one batched product."""

    experts: list[int]
    places: slice
    """Of the experts, among all as the products have them."""
    rows: slice


class Sorted(Grouped):
    """A batched product for each batch; experts batch by batch."""

    def __init__(self, offsets_E: Tensor, batches: Sequence[tuple[list[int], int]]) -> None:
        """batches: the experts of each, and how many rows each of these gets."""
        super().__init__(offsets_E)
        starts = [0, *offsets_E.tolist()]
        self.batches: list[Batch] = []
        self.num_rows = place = 0
        shift_E = [0] * len(offsets_E)
        for experts, rows in batches:
            for i, e in enumerate(experts):
                shift_E[e] = self.num_rows + i * rows - starts[e]
            end = self.num_rows + len(experts) * rows
            self.batches.append(Batch(experts, slice(place, place + len(experts)), slice(self.num_rows, end)))
            place, self.num_rows = place + len(experts), end
        counts_E = torch.tensor([end - start for start, end in pairwise(starts)])
        shift_A = torch.tensor(shift_E).repeat_interleave(counts_E, output_size=starts[-1])
        self.place_A = torch.arange(starts[-1]) + shift_A

    def spread(self, values_A: Tensor) -> Tensor:
        return values_A.new_zeros(self.num_rows).index_copy_(0, self.place_A, values_A)

    def collect(self, values_P: Tensor) -> Tensor:
        return values_P.index_select(0, self.place_A)

    def places(self, row_A: Tensor) -> Tensor:
        return self.place_A.index_select(0, row_A)

    def cast(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        sorted_w = torch.empty_like(w, dtype=dtype)
        for batch in self.batches:
            for one, e in zip(sorted_w[batch.places], batch.experts):
                one.copy_(w[e])
        return sorted_w

    def product(self, x_PD: Tensor, w_EDF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        y_PF = x_PD.new_empty(len(x_PD), w_EDF.shape[2])
        for experts, places, rows in self.batches:
            x_ECD, y_ECF = _by_expert(x_PD[rows], len(experts)), _by_expert(y_PF[rows], len(experts))
            if bias_EF is None:
                torch.bmm(x_ECD, w_EDF[places], out=y_ECF)
            else:
                torch.baddbmm(bias_EF[places, None], x_ECD, w_EDF[places], out=y_ECF)
        return y_PF

    def wgrad(self, x_PD: Tensor, y_PF: Tensor, dtype: torch.dtype) -> Tensor:
        dw_EDF = x_PD.new_empty(len(self.offsets_E), x_PD.shape[1], y_PF.shape[1], dtype=dtype)
        for experts, _, rows in self.batches:
            x_ECD, y_ECF = _by_expert(x_PD[rows], len(experts)), _by_expert(y_PF[rows], len(experts))
            for e, one in zip(experts, x_ECD.transpose(1, 2).bmm(y_ECF)):
                dw_EDF[e] = one
        return dw_EDF

    def sums(self, y_PF: Tensor) -> Tensor:
        sum_EF = y_PF.new_empty(len(self.offsets_E), y_PF.shape[1])
        for experts, _, rows in self.batches:
            sum_EF[experts] = _by_expert(y_PF[rows], len(experts)).sum(1)
        return sum_EF


def products_of(offsets_E: Tensor, num_rows: int, equal: bool, numbers: int, dtype: torch.dtype) -> Grouped:
    """How to multiply the rows of a routing in `dtype`; no host synchronisation on a GPU.

    Args:
        offsets_E, equal: see `Routing`. num_rows: A. numbers: in an expert's matrix of the first projection.
    """
    if equal:
        return Batched(offsets_E)
    if dtype.itemsize > MAX_BYTES or num_rows > MAX_ROWS * len(offsets_E) or not _known_on_host(offsets_E):
        return Grouped(offsets_E)
    counts = [end - start for start, end in pairwise([0, *offsets_E.tolist()])]
    batches = list(alike(counts, max(1, MAX_NUMBERS // numbers)))
    return Grouped(offsets_E) if len(counts) < MIN_EXPERTS * len(batches) else Sorted(offsets_E, batches)


def alike(counts: Sequence[int], largest: int) -> Iterator[tuple[list[int], int]]:
    """Experts of about as many rows, no more than `largest` at a time, and how many rows each of these gets."""
    experts: list[int] = []
    most = filled = 0
    for e in sorted(range(len(counts)), key=lambda e: -counts[e]):
        missing = most - counts[e]
        if experts and (len(experts) == largest or filled + missing > MAX_FILLED * most * len(experts)):
            yield experts, -(-most // MULTIPLE) * MULTIPLE
            experts = []
        if not experts:
            most, filled, missing = counts[e], 0, 0
        filled += missing
        experts.append(e)
    yield experts, -(-most // MULTIPLE) * MULTIPLE


def _known_on_host(offsets_E: Tensor) -> bool:
    """Whether the host knows how many rows an expert has without waiting: not while a graph is made without data."""
    return offsets_E.device.type == "cpu" and type(offsets_E) is Tensor and not torch.compiler.is_compiling()


def _by_expert(x_PD: Tensor, num_experts: int) -> Tensor:
    """(E, C, D) of equal experts."""
    return x_PD.view(num_experts, len(x_PD) // num_experts, x_PD.shape[1])


def _cast_blocks(wide_EDF: Tensor) -> Iterator[slice]:
    """Few experts at a time, so that a narrow and a wide copy of all never live side by side."""
    size = max(1, CAST_BLOCK // wide_EDF[0].numel())
    for start in range(0, len(wide_EDF), size):
        yield slice(start, min(start + size, len(wide_EDF)))
