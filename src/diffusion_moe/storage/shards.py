"""The blocks of a tensor that a process holds, for any mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .collective import CheckpointError

PAIRS = 1 << 18
"""Pairs of blocks compared at a time."""


class Block(NamedTuple):
    """A box of consecutive elements of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def within(self, outer: Block) -> tuple[slice, ...]:
        """Slices of `outer` that select this block."""
        starts = [mine - theirs for mine, theirs in zip(self.offsets, outer.offsets)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes))


def whole(shape: Sequence[int]) -> Block:
    """The block of all elements."""
    return Block((0,) * len(shape), tuple(shape))


def overlap(a: Block, b: Block) -> Block | None:
    """Intersection of two blocks; None if it is empty."""
    starts = tuple(map(max, a.offsets, b.offsets))
    ends = (min(i + n, j + m) for i, n, j, m in zip(a.offsets, a.sizes, b.offsets, b.sizes))
    sizes = tuple(end - start for start, end in zip(starts, ends))
    return None if any(size <= 0 for size in sizes) else Block(starts, sizes)


def tiles(shape: Sequence[int], blocks: Sequence[Block]) -> bool:
    """True if blocks cover a tensor, each element once."""
    if sum(block.numel for block in blocks) != math.prod(shape):
        return False
    starts = np.array([block.offsets for block in blocks], dtype=np.int64).reshape(len(blocks), len(shape))
    ends = starts + np.array([block.sizes for block in blocks], dtype=np.int64).reshape(starts.shape)
    if (starts < 0).any() or (ends < starts).any() or (ends > np.array(shape, dtype=np.int64)).any():
        return False
    overlaps, rows = 0, max(1, PAIRS // max(1, len(blocks)))
    for some in range(0, len(blocks), rows):  # some blocks against all, so that memory is limited
        meet = (starts[some : some + rows, None] < ends) & (starts < ends[some : some + rows, None])
        overlaps += int(meet.all(-1).sum())
    return overlaps == (len(blocks) if math.prod(shape) else 0)  # each overlaps itself alone


def local_tensor(tensor: Tensor) -> Tensor:
    """This process' part of a DTensor, or a plain tensor itself; shares the memory, without a gradient."""
    with torch.no_grad():
        return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def held_blocks(tensor: Tensor) -> dict[Block, tuple[slice, ...]]:
    """The blocks of a tensor that this process holds, each with its slices of `local_tensor`.

    Every process holds all of a plain tensor. A DTensor is split as its placements say; `_StridedShard`, which
    FSDP2 leaves on a dimension that another mesh dimension splits too, may leave several blocks.

    Raises:
        CheckpointError: the tensor is partial (awaits a reduction), or its placement is of an unknown kind.
    """
    shape, mesh = tuple(tensor.shape), getattr(tensor, "device_mesh", None)
    everything = whole(shape)
    if mesh is None or not everything.numel:
        return {everything: (slice(None),) * len(shape)}
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this process is not in the mesh
        return {}
    splits: list[list[_Split]] = [[] for _ in shape]
    for parts, part, placement in zip(mesh.shape, coordinate, tensor.placements):  # type: ignore[attr-defined]
        _note_split(splits, parts, part, placement)
    runs = [_runs(size, tuple(split)) for size, split in zip(shape, splits)]
    # The sizes differ if a strided split is uneven: FSDP2 then holds other rows than the placements say.
    if tuple(sum(run.length for run in row) for row in runs) != tuple(local_tensor(tensor).shape):
        raise CheckpointError(
            f"a tensor of shape {shape} on a mesh of {tuple(mesh.shape)} is split as {tensor.placements}, "  # type: ignore[attr-defined]
            f"but this process holds {tuple(local_tensor(tensor).shape)} of it; choose sizes that split evenly"
        )
    return {
        Block(tuple(run.start for run in box), tuple(run.length for run in box)): tuple(
            slice(run.local_start, run.local_start + run.length) for run in box
        )
        for box in itertools.product(*runs)
    }


class _Split(NamedTuple):
    """A mesh dimension that splits a tensor's dimension."""

    parts: int
    part: int
    strips: int
    """Strips that the dimension is cut into first; each is then split by itself (`_StridedShard.split_factor`)."""


class _Run(NamedTuple):
    """Consecutive rows of a dimension."""

    start: int
    local_start: int
    """Index of the first row in the local tensor."""
    length: int


def _note_split(splits: list[list[_Split]], parts: int, part: int, placement: Any) -> None:
    if placement.is_replicate():
        return
    dim = getattr(placement, "dim", None)
    if placement.is_partial() or dim is None:
        raise CheckpointError(f"its placement is {placement}; only Replicate and Shard can be saved or loaded")
    splits[dim].append(_Split(parts, part, int(getattr(placement, "split_factor", 1))))


@lru_cache(maxsize=4096)
def _runs(size: int, splits: tuple[_Split, ...]) -> tuple[_Run, ...]:
    rows = torch.arange(size, device="cpu")
    for split in splits:
        rows = torch.cat([_chunk(strip, split.parts, split.part) for strip in rows.chunk(split.strips)])
    if not len(rows):
        return ()
    starts = [0, *(torch.nonzero(rows.diff() != 1).flatten() + 1).tolist(), len(rows)]
    return tuple(_Run(int(rows[a]), a, b - a) for a, b in itertools.pairwise(starts))


def _chunk(rows: Tensor, parts: int, part: int) -> Tensor:
    # Shard follows torch.chunk: the last parts may be smaller, or empty.
    chunks = rows.chunk(parts)
    return chunks[part] if part < len(chunks) else rows[:0]
