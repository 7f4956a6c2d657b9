"""Renaming and reshaping of state dicts by a table of names, which is read in both directions.

Linear layers hold matrices of (outputs, inputs), so that joining two of them joins their rows. Stacked experts are
(E, inputs, outputs) here and a module each in the reference formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Form = Literal["same", "patch", "pointwise", "lead", "experts"]
"""Difference of shape between the reference format and ours.

same: none.
patch: a convolution (D, C, P, P) there, a matrix (D, C * P * P) here.
pointwise: the same with P = 1.
lead: a first axis of length 1 there.
experts: a matrix or vector per module there, one stack of transposed matrices or of vectors here.
"""


class Row(NamedTuple):
    """Our tensors and the reference tensors with the same values, both joined along their first axis."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    """Reference names; with {e} for the expert's index in the form of experts."""
    form: Form = "same"


class Layout(NamedTuple):
    """A reference format for one architecture."""

    rows: list[Row]
    num_experts: int
    patch: tuple[int, ...]
    """C, P, P of the patch embedding."""
    reference_rows: dict[str, int]
    """Rows of each part of a joined reference matrix by the name of its layer, if they differ."""
    constants: dict[str, Tensor]
    """Reference tensors that are settings here."""

    def reference_names(self) -> set[str]:
        """Names of the reference state dict."""
        return {name for row in self.rows for name in self.expanded(row)} | set(self.constants)

    def expanded(self, row: Row) -> list[str]:
        """Reference names of a row, with every expert's index filled in."""
        if row.form != "experts":
            return list(row.theirs)
        return [name.format(e=e) for e in range(self.num_experts) for name in row.theirs]


def from_reference(layout: Layout, state: Mapping[str, Tensor]) -> State:
    """Convert reference tensors to ours.

    Raises:
        ValueError: names are missing or unknown; the message lists them.
    """
    expected = layout.reference_names()
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has unknown {_some(unknown)}"] * bool(unknown)
        raise ValueError(f"the checkpoint does not fit its architecture: it {' and '.join(parts)}")
    out: State = {}
    for row in layout.rows:
        try:
            joined = _join_theirs(layout, row, state)
        except RuntimeError as error:  # parts of different shapes
            raise ValueError(f"the checkpoint's {row.theirs[0]} has a shape that does not fit: {error}") from error
        out |= zip(row.ours, joined.chunk(len(row.ours)))
    return {name: tensor.contiguous() for name, tensor in out.items()}


def to_reference(layout: Layout, state: Mapping[str, Tensor]) -> State:
    """Convert our tensors to reference tensors.

    Raises:
        ValueError: the format lacks some of our tensors.
    """
    known = {name for row in layout.rows for name in row.ours}
    unknown = sorted(state.keys() - known)
    if unknown:
        raise ValueError(f"the reference format has no tensors for {_some(unknown)}")
    out = dict(layout.constants)
    for row in layout.rows:
        out |= _split_ours(layout, row, torch.cat([state[name] for name in row.ours]))
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _join_theirs(layout: Layout, row: Row, state: Mapping[str, Tensor]) -> Tensor:
    if row.form == "experts":
        each = [torch.cat([state[name.format(e=e)] for name in row.theirs]) for e in range(layout.num_experts)]
        return _transposed(torch.stack(each))
    joined = torch.cat([state[name] for name in row.theirs])
    if row.form == "lead":
        return joined[0]
    return joined.flatten(1) if row.form in ("patch", "pointwise") else joined


def _split_ours(layout: Layout, row: Row, joined: Tensor) -> State:
    if row.form == "experts":
        parts = [part for matrix in _transposed(joined) for part in matrix.chunk(len(row.theirs))]
        return dict(zip(layout.expanded(row), parts))
    if row.form == "patch":
        joined = joined.unflatten(1, layout.patch)
    elif row.form == "pointwise":
        joined = joined[..., None, None]
    elif row.form == "lead":
        joined = joined[None]
    if len(row.theirs) == 1:
        return {row.theirs[0]: joined}
    sizes = [layout.reference_rows[name.split(".")[-2]] for name in row.theirs]
    return dict(zip(row.theirs, joined.split(sizes)))


def _transposed(stack: Tensor) -> Tensor:
    """Each matrix of a stack transposed; vectors as they are."""
    return stack.mT if stack.ndim == 3 else stack


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
