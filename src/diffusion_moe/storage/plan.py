"""The plan of a save: which process writes which shards into which files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .collective import CheckpointError, listed
from .files import dtype_name
from .shards import Block, held_blocks

FILE_BYTES = 1 << 31
"""Largest size of a file, unless a single shard is larger; a process writes and checks several files at a time."""


class TensorLayout(NamedTuple):
    """A tensor and its blocks that one process holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


class WriteItem(NamedTuple):
    """A block that a process writes."""

    name: str
    block: Block
    bytes: int


class WritePlan(NamedTuple):
    """All processes' writes."""

    layouts: Mapping[str, TensorLayout]
    """Layouts of this process; dtypes and shapes are the same on all."""
    files: tuple[tuple[tuple[WriteItem, ...], ...], ...]
    """Writes by rank and file."""


def make_write_plan(layouts: Sequence[Mapping[str, TensorLayout]], rank: int) -> WritePlan:
    """The plan from the layouts of all processes by rank, the same on every process (see `assign_writes`)."""
    return WritePlan(layouts[rank], tuple(tuple(_split(items)) for items in assign_writes(layouts)))


def layouts_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorLayout]:
    """The layout of each tensor on this process.

    Raises:
        CheckpointError: a tensor cannot be saved; the message names it.
    """
    layouts = {}
    for name, tensor in tensors.items():
        try:
            dtype_name(tensor.dtype)
            layouts[name] = TensorLayout(tensor.dtype, tuple(tensor.shape), tuple(held_blocks(tensor)))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
    return layouts


def assign_writes(layouts: Sequence[Mapping[str, TensorLayout]]) -> list[list[WriteItem]]:
    """The writes of each process: every block once, by a process that holds it, balanced by bytes.

    Args:
        layouts: the layouts of each process, by rank.

    Raises:
        CheckpointError: the processes hold different tensors, or no process holds some part of a tensor.
    """
    _check_same(layouts)
    writes: list[list[WriteItem]] = [[] for _ in layouts]
    load = [0] * len(layouts)
    replicated: list[tuple[WriteItem, list[int]]] = []
    for name, layout in layouts[0].items():
        holders: dict[Block, list[int]] = {}
        for rank, own in enumerate(layouts):
            for block in own[name].blocks:
                holders.setdefault(block, []).append(rank)
        if sum(block.numel for block in holders) != math.prod(layout.shape):
            raise CheckpointError(f"{name}: the processes hold {list(holders)} of its shape {layout.shape}")
        for block, ranks in holders.items():
            item = WriteItem(name, block, block.numel * layout.dtype.itemsize)
            if len(ranks) == 1:
                writes[ranks[0]].append(item)
                load[ranks[0]] += item.bytes
            else:
                replicated.append((item, ranks))
    for item, ranks in sorted(replicated, key=lambda entry: -entry[0].bytes):  # largest first balances better
        rank = min(ranks, key=load.__getitem__)
        writes[rank].append(item)
        load[rank] += item.bytes
    return writes


def _check_same(layouts: Sequence[Mapping[str, TensorLayout]]) -> None:
    for rank, own in enumerate(layouts):
        if own.keys() != layouts[0].keys():
            names = sorted(own.keys() ^ layouts[0].keys())
            raise CheckpointError(f"ranks 0 and {rank} save different tensors: one of them lacks {listed(names)}")
        for name, layout in own.items():
            if layout[:2] != layouts[0][name][:2]:
                raise CheckpointError(f"{name} is {layouts[0][name][:2]} on rank 0 and {layout[:2]} on rank {rank}")


def _split(items: Iterable[WriteItem]) -> list[tuple[WriteItem, ...]]:
    """A process' writes in order, divided into files of at most FILE_BYTES."""
    files: list[list[WriteItem]] = []
    size = FILE_BYTES + 1
    for item in items:
        size += item.bytes
        if size > FILE_BYTES:
            files.append([])
            size = item.bytes
        files[-1].append(item)
    return [tuple(file) for file in files]
