"""Checkpoints written in the background while training continues."""

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
from .manifest import check_metadata
from .plan import TensorLayout, WritePlan, layouts_of, make_write_plan
from .writing import Shard, checkpoint_path, commit, prune, shards_of


class AsyncWriter:
    """Background writer of checkpoints; a context manager, created and used by all processes alike.

    `save` copies this process' shards into buffers that later saves reuse (pinned for CUDA), then returns. A thread
    writes the copy, over a gloo group of its own, and deletes old checkpoints. One save runs at a time. Its error is
    raised by the next `save`, `wait` or `close`; after LostProcess the writer cannot be used any more.

    A checkpoint appears under its name when all of it is on the disk, or not at all; it replaces an older one of the
    same step. Unfinished checkpoints of earlier attempts are removed.

    Args:
        folder: the folder of the checkpoints, the same for all processes; on many nodes, a shared file system.
        keep: number of checkpoints to keep, see `prune`.
        keep_every: step interval of checkpoints to keep for ever, see `prune`.
        timeout: see `collective.TIMEOUT`.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0, timeout: timedelta = TIMEOUT) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.group = storage_group(timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._save_in_progress: Future[Path] | None = None
        self._plan: WritePlan | None = None
        self._buffers: list[Tensor] = []

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of the tensors as they are now, once the last save has ended.

        Args:
            step: the step in the checkpoint's name.
            tensors: plain ones (equal on all processes, written once) and DTensors (each shard is written once).
            metadata: JSON to store beside the tensors; rank 0's is written.

        Raises:
            OSError, CheckpointError: on every process, why the last save failed, or why this one cannot begin.
            ValueError: on every process, the metadata are not JSON.
        """
        self.wait()
        collective = Collective(checkpoint_path(self.folder, step), self.group)
        checked = collective.run_on_all("checking metadata", lambda: check_metadata(metadata))
        plan = self._make_plan(collective, collective.run_on_all("planning a checkpoint", lambda: layouts_of(tensors)))
        files = collective.run_on_all("copying tensors", lambda: self._copy(shards_of(plan, collective.rank, tensors)))
        self._save_in_progress = self._thread.submit(self._write, collective, step, plan, files, checked)

    def failed(self) -> bool:
        """True if the save in progress is known to have failed; `save` and `wait` raise why."""
        save = self._save_in_progress
        return save is not None and save.done() and save.exception() is not None

    def wait(self, timeout_s: float | None = None) -> Path | None:
        """Wait for the save in progress and return its checkpoint; None if there is none.

        Raises:
            OSError, CheckpointError: on every process, why it failed.
            TimeoutError: it still runs after so many seconds; only os._exit ends Python without it.
        """
        if self._save_in_progress is None:
            return None
        try:
            return self._save_in_progress.result(timeout_s)
        finally:
            if self._save_in_progress.done():
                self._save_in_progress = None

    def close(self) -> None:
        """Wait for the save in progress, and end (see `wait`)."""
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
            error.add_note(f"the last save also failed: {failure}")

    def _make_plan(self, collective: Collective, layouts: Mapping[str, TensorLayout]) -> WritePlan:
        """The last plan, unless a layout changed: gathering the layouts of many processes takes seconds."""
        known = self._plan is not None and self._plan.layouts == layouts
        if self._plan is None or not all(collective.gather("comparing layouts", lambda: known)):
            self._plan = make_write_plan(collective.gather("gathering layouts", lambda: layouts), collective.rank)
        return self._plan

    def _copy(self, files: Sequence[Sequence[Shard]]) -> list[list[Shard]]:
        sizes = [sum(shard.tensor.nbytes for shard in file) for file in files]
        cuda = any(shard.tensor.is_cuda for file in files for shard in file)
        if [len(buffer) for buffer in self._buffers] != sizes:
            self._buffers.clear()  # freed before new ones are allocated
            self._buffers = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=cuda) for size in sizes]
        copies = [_copy_into(buffer, file) for buffer, file in zip(self._buffers, files)]
        if cuda:
            torch.cuda.synchronize()  # before training changes the tensors
        return copies

    def _write(
        self,
        collective: Collective,
        step: int,
        plan: WritePlan,
        files: list[list[Shard]],
        metadata: dict[str, Any],
    ) -> Path:
        path = commit(collective, step, plan, files, metadata)
        collective.run_on_main("deleting old checkpoints", lambda: prune(self.folder, self.keep, self.keep_every, path))
        return path


def _copy_into(buffer: Tensor, file: Sequence[Shard]) -> list[Shard]:
    copies, start = [], 0
    for shard in sorted(file, key=lambda shard: -shard.tensor.itemsize):  # so that all are aligned
        end = start + shard.tensor.nbytes
        copy = buffer[start:end].view(shard.tensor.dtype).view(shard.tensor.shape)
        copy.copy_(shard.tensor, non_blocking=True)
        copies.append(Shard(shard.key, copy))
        start = end
    return copies
