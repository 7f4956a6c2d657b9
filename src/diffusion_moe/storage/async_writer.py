"""Checkpoints written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .collective import TIMEOUT, Collective, storage_group
from .manifest import check_about
from .plan import Layout, Plan, layouts_of, make_plan
from .writing import Piece, checkpoint_path, commit, pieces_of, prune


class AsyncWriter:
    """Writes checkpoints in the background; a context manager, made and used on all processes alike.

    `save` copies what this process writes into memory that is kept from one save to the next (pinned for CUDA), then
    returns. A thread writes the copy, talking to the other processes over a gloo group of its own, and drops old
    checkpoints. One save is under way at a time. A save that failed is raised by the next `save`, `wait` or `close`;
    after LostProcess the writer is of no more use, after other errors it is.

    Args:
        folder: where the checkpoints lie, see `write`.
        keep, keep_every: see `prune`.
        timeout: see `peers.TIMEOUT`.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, timeout: timedelta = TIMEOUT) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.group = storage_group(timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[Path] | None = None
        self._plan: Plan | None = None
        self._buffers: list[Tensor] = []

    def save(self, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of the tensors as they are now (see `write`), once the last save has ended.

        Raises:
            OSError, CheckpointError: on every process, why the last save failed, or why this one cannot begin.
        """
        self.wait()
        peers = Collective(checkpoint_path(self.folder, step), self.group)
        said, layouts = peers.run_on_all("planning a checkpoint", lambda: (check_about(about), layouts_of(tensors)))
        plan = self._make_plan(peers, layouts)
        parts = peers.run_on_all("copying tensors", lambda: self._copy(pieces_of(plan, peers.rank, tensors)))
        self._under_way = self._thread.submit(self._write, peers, step, plan, parts, said)

    def wait(self, timeout_s: float | None = None) -> Path | None:
        """The checkpoint that was under way, once it is written; None if there was none.

        Raises:
            OSError, CheckpointError: on every process, why it failed.
            TimeoutError: it is still under way after so many seconds; only os._exit ends Python without it.
        """
        if self._under_way is None:
            return None
        try:
            return self._under_way.result(timeout_s)
        finally:
            if self._under_way.done():
                self._under_way = None

    def close(self) -> None:
        """Wait for the save under way, and end (see `wait`)."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"moreover, the last save failed: {failure}")

    def _make_plan(self, peers: Collective, layouts: Mapping[str, Layout]) -> Plan:
        """The last one, unless a process has a new layout: with many processes, telling all layouts takes seconds."""
        known = self._plan is not None and self._plan.layouts == layouts
        if self._plan is None or not all(peers.gather("comparing layouts", lambda: known)):
            self._plan = make_plan(peers.gather("telling layouts", lambda: layouts), peers.rank)
        return self._plan

    def _copy(self, parts: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
        sizes = [sum(piece.tensor.nbytes for piece in part) for part in parts]
        cuda = any(piece.tensor.is_cuda for part in parts for piece in part)
        if [len(buffer) for buffer in self._buffers] != sizes:
            self._buffers.clear()  # freed before new ones are taken
            self._buffers = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=cuda) for size in sizes]
        copies = [_copy_into(buffer, part) for buffer, part in zip(self._buffers, parts)]
        if cuda:
            torch.cuda.synchronize()  # before training changes the tensors
        return copies

    def _write(self, peers: Collective, step: int, plan: Plan, parts: list[list[Piece]], about: dict[str, Any]) -> Path:
        path = commit(peers, step, plan, parts, about)
        peers.first("dropping old checkpoints", lambda: prune(self.folder, self.keep, self.keep_every, path))
        return path


def _copy_into(buffer: Tensor, part: Sequence[Piece]) -> list[Piece]:
    copies, start = [], 0
    for piece in sorted(part, key=lambda piece: -piece.tensor.itemsize):  # so that all are aligned
        end = start + piece.tensor.nbytes
        copy = buffer[start:end].view(piece.tensor.dtype).view(piece.tensor.shape)
        copy.copy_(piece.tensor, non_blocking=True)
        copies.append(Piece(piece.key, copy))
        start = end
    return copies
