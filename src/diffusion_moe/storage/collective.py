"""Work of several processes together: an error of one is raised on all, and no process waits for one that failed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""Longest wait of a process for the others.

A killed process is noticed at once, because its connections close; the timeout is for one that hangs, or whose machine
is lost. It must exceed the time between the first and the last process to finish writing or checking its files.
"""


class CheckpointError(ValueError):
    """A checkpoint is truncated, corrupt or of another model."""


class LostProcess(ConnectionError):
    """A process is dead, hangs, or is slower than the timeout; the group cannot be used any more."""


_KEPT_KINDS: dict[str, type[ValueError]] = {"CheckpointError": CheckpointError, "ValueError": ValueError}
"""Errors that other processes raise with the same class; so is OSError."""


class _Failure(NamedTuple):
    """An exception as it is sent to other processes."""

    kind: str
    errno: int
    reason: str


class _Message(NamedTuple):
    """A message of one process to the others."""

    doing: str
    result: object = None
    failure: _Failure | None = None


def storage_group(timeout: timedelta = TIMEOUT) -> dist.ProcessGroup | None:
    """A gloo group of all processes for storage alone; None for a single process. All processes must call this."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timeout)


class Collective:
    """The processes of a group that work on one path; also a single process.

    Args:
        group: the process group; None is the default group, or one process where none is initialised.
    """

    def __init__(self, path: Path, group: dist.ProcessGroup | None = None) -> None:
        self.path, self.group = path, group
        together = group is not None or (dist.is_available() and dist.is_initialized())
        self.size = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0

    def gather(self, doing: str, work: Callable[[], T]) -> list[T]:
        """Do `work` on every process; return the results of all, by rank.

        Returns only when all processes are done. Results are pickled, among processes of one program.

        Args:
            doing: name of the work for messages; must be the same on all processes.

        Raises:
            OSError, CheckpointError, ValueError: on every process, what failed on any, with its rank.
            RuntimeError: likewise, for errors of other classes; or the processes did different work.
            LostProcess: another process did not answer.
        """
        if self.size == 1:
            return [work()]
        cause = None
        try:
            message = _Message(doing, work())
        except LostProcess:  # the others cannot be reached
            raise
        except Exception as error:
            cause, message = error, _Message(doing, failure=_describe(error))
        messages: list[_Message] = [message] * self.size
        try:
            dist.all_gather_object(messages, message, group=self.group)
        except RuntimeError as error:
            reason = f"lost a process while {doing}; it is dead, or slower than the timeout"
            raise LostProcess(errno.ECONNRESET, reason, str(self.path)) from error
        failures = {rank: message.failure for rank, message in enumerate(messages) if message.failure is not None}
        if failures:
            raise self._joint_error(failures) from cause
        doings = [message.doing for message in messages]
        if len(set(doings)) > 1:
            raise RuntimeError(f"the processes do different work: {dict(enumerate(doings))}")
        return [message.result for message in messages]  # type: ignore[misc]

    def run_on_all(self, doing: str, work: Callable[[], T]) -> T:
        """Do `work` on every process; return this one's result, or raise on all what failed on any (see `gather`)."""
        result: T

        def keep_result() -> None:  # it stays here: only errors are exchanged
            nonlocal result
            result = work()

        self.gather(doing, keep_result)
        return result

    def run_on_main(self, doing: str, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 alone; return its result on all, or raise on all (see `gather`)."""
        return self.gather(doing, lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _joint_error(self, failures: dict[int, _Failure]) -> Exception:
        first = next(iter(failures.values()))
        alike = [rank for rank, failure in failures.items() if failure == first]
        others = [rank for rank in failures if rank not in alike]
        reason = f"{_named(alike)}: {first.reason}" + (f" (and other errors on {_named(others)})" if others else "")
        if first.kind == "OSError":
            return OSError(first.errno, reason, str(self.path))
        if first.kind in _KEPT_KINDS:  # if all raised the same, the rank does not matter
            return _KEPT_KINDS[first.kind](first.reason if len(alike) == self.size else reason)
        return RuntimeError(f"{reason} ({first.kind})")


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + listed([str(rank) for rank in ranks])


def _describe(error: Exception) -> _Failure:
    if isinstance(error, OSError):
        file = f" ({error.filename})" if error.filename else ""
        return _Failure("OSError", error.errno or errno.EIO, f"{error.strerror or error}{file}")
    kind = next((name for name, known in _KEPT_KINDS.items() if isinstance(error, known)), type(error).__name__)
    return _Failure(kind, 0, " ".join(str(error).split()))


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first few names and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
