"""How one state dict becomes another: rows of names, read in both directions.

Linear layers hold matrices of (outputs, inputs), so that joining two of them joins their rows. Stacked experts are
(E, inputs, outputs) here and a module each in the reference formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Form = Literal["same", "patch", "pointwise", "lead", "experts", "expert_biases"]
"""same: as it is. patch: a convolution (D, C, P, P) there, a matrix (D, C * P * P) here. pointwise: the same of P = 1.
lead: an axis of length 1 first there. experts: matrices of many modules there, one stack of transposed matrices here.
expert_biases: the same of vectors.
"""


class Row(NamedTuple):
    """One or several tensors here that hold the same numbers as one or several there, joined along their rows."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    """Names; for the forms of experts with {e} for the expert's number."""
    form: Form = "same"


@dataclass(frozen=True)
class Layout:
    """A reference format for one architecture."""

    rows: list[Row]
    num_experts: int = 0
    patch: tuple[int, ...] = ()
    """C, P, P of the patch embedding."""
    their_rows: dict[str, int] = field(default_factory=dict)
    """Rows of the parts of a joined matrix there, where they are not all equal."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Tensors there that are settings here."""

    def reference_names(self) -> set[str]:
        """Names of the reference state dict."""
        return {name for row in self.rows for name in self.expanded(row)} | set(self.constants)

    def expanded(self, row: Row) -> list[str]:
        """Reference names of a row, with every expert's number filled in."""
        if row.form not in ("experts", "expert_biases"):
            return list(row.theirs)
        return [name.format(e=e) for e in range(self.num_experts) for name in row.theirs]


def from_reference(layout: Layout, state: Mapping[str, Tensor]) -> State:
    """Reference tensors as ours.

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
        except RuntimeError as error:  # parts of unlike shapes
            raise ValueError(f"the checkpoint's {row.theirs[0]} has a shape that does not fit: {error}") from error
        out |= zip(row.ours, joined.chunk(len(row.ours)))
    return {name: tensor.contiguous() for name, tensor in out.items()}


def to_reference(layout: Layout, state: Mapping[str, Tensor]) -> State:
    """Our tensors as the reference ones.

    Raises:
        ValueError: some of our tensors have no place in the format.
    """
    placed = {name for row in layout.rows for name in row.ours}
    homeless = sorted(state.keys() - placed)
    if homeless:
        raise ValueError(f"the reference format has no place for {_some(homeless)}")
    out = dict(layout.constants)
    for row in layout.rows:
        out |= _split_ours(layout, row, torch.cat([state[name] for name in row.ours]))
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _join_theirs(layout: Layout, row: Row, state: Mapping[str, Tensor]) -> Tensor:
    if row.form in ("experts", "expert_biases"):
        each = [torch.cat([state[name.format(e=e)] for name in row.theirs]) for e in range(layout.num_experts)]
        stack = torch.stack(each)
        return stack.transpose(1, 2) if row.form == "experts" else stack
    joined = torch.cat([state[name] for name in row.theirs])
    if row.form == "lead":
        return joined[0]
    return joined.flatten(1) if row.form in ("patch", "pointwise") else joined


def _split_ours(layout: Layout, row: Row, joined: Tensor) -> State:
    if row.form in ("experts", "expert_biases"):
        stack = joined.transpose(1, 2) if row.form == "experts" else joined
        parts = [part for matrix in stack for part in matrix.chunk(len(row.theirs))]
        return dict(zip(layout.expanded(row), parts))
    if row.form == "patch":
        joined = joined.unflatten(1, layout.patch)
    elif row.form == "pointwise":
        joined = joined[..., None, None]
    elif row.form == "lead":
        joined = joined[None]
    if len(row.theirs) == 1:
        return {row.theirs[0]: joined}
    sizes = [layout.their_rows.get(name, len(joined) // len(row.theirs)) for name in row.theirs]
    return dict(zip(row.theirs, joined.split(sizes)))


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
