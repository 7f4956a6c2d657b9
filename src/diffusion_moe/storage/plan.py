"""Which process writes which pieces, into which files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .collective import CheckpointError, listed
from .files import dtype_name
from .shards import Block, held_blocks

PART_BYTES = 1 << 31
"""Most bytes of a file, unless a single piece is larger; a process writes, and checks, several files at a time."""


class Layout(NamedTuple):
    """A tensor and the boxes of it that one process holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


class Share(NamedTuple):
    """A box that a process writes."""

    name: str
    block: Block
    bytes: int


class Plan(NamedTuple):
    """Who writes what."""

    layouts: Mapping[str, Layout]
    """Of this process; dtypes and shapes are everyone's."""
    parts: tuple[tuple[tuple[Share, ...], ...], ...]
    """By rank, then by file."""


def make_plan(layouts: Sequence[Mapping[str, Layout]], rank: int) -> Plan:
    """The plan that every process comes to, from the layouts of all by rank (see `share_out`)."""
    return Plan(layouts[rank], tuple(tuple(_split(share)) for share in share_out(layouts)))


def layouts_of(tensors: Mapping[str, Tensor]) -> dict[str, Layout]:
    """How this process holds each of its tensors.

    Raises:
        CheckpointError: a tensor cannot be saved; names it.
    """
    layouts = {}
    for name, tensor in tensors.items():
        try:
            dtype_name(tensor.dtype)
            layouts[name] = Layout(tensor.dtype, tuple(tensor.shape), tuple(held_blocks(tensor)))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
    return layouts


def share_out(layouts: Sequence[Mapping[str, Layout]]) -> list[list[Share]]:
    """What each process writes: every box once, by one that holds it, spread evenly by bytes.

    Args:
        layouts: of each process, by rank.

    Raises:
        CheckpointError: the processes hold different tensors, or some part of a tensor is held by none.
    """
    _check_same(layouts)
    shares: list[list[Share]] = [[] for _ in layouts]
    load = [0] * len(layouts)
    replicated: list[tuple[Share, list[int]]] = []
    for name, layout in layouts[0].items():
        holders: dict[Block, list[int]] = {}
        for rank, own in enumerate(layouts):
            for block in own[name].blocks:
                holders.setdefault(block, []).append(rank)
        if sum(block.numel for block in holders) != math.prod(layout.shape):
            raise CheckpointError(f"{name}: the processes hold {list(holders)} of its shape {layout.shape}")
        for block, ranks in holders.items():
            share = Share(name, block, block.numel * layout.dtype.itemsize)
            if len(ranks) == 1:
                shares[ranks[0]].append(share)
                load[ranks[0]] += share.bytes
            else:
                replicated.append((share, ranks))
    for share, ranks in sorted(replicated, key=lambda entry: -entry[0].bytes):  # large first: a more even end
        rank = min(ranks, key=load.__getitem__)
        shares[rank].append(share)
        load[rank] += share.bytes
    return shares


def _check_same(layouts: Sequence[Mapping[str, Layout]]) -> None:
    for rank, own in enumerate(layouts):
        if own.keys() != layouts[0].keys():
            names = sorted(own.keys() ^ layouts[0].keys())
            raise CheckpointError(f"ranks 0 and {rank} save different tensors: one of them lacks {listed(names)}")
        for name, layout in own.items():
            if layout[:2] != layouts[0][name][:2]:
                raise CheckpointError(f"{name} is {layouts[0][name][:2]} on rank 0 and {layout[:2]} on rank {rank}")


def _split(share: Iterable[Share]) -> list[tuple[Share, ...]]:
    parts: list[list[Share]] = []
    size = PART_BYTES + 1
    for piece in share:
        size += piece.bytes
        if size > PART_BYTES:
            parts.append([])
            size = piece.bytes
        parts[-1].append(piece)
    return [tuple(part) for part in parts]
