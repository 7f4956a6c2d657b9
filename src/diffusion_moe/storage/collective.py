"""The processes that save and load together: one's failure becomes everyone's error, not everyone's wait."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others.

One that is killed is noticed at once, because its connections close; this is for one that hangs, or whose machine is
gone. It must exceed the time between the first and the last process to finish writing or checking its files.
"""


class CheckpointError(ValueError):
    """A checkpoint is truncated, corrupt or another model's."""


class LostProcess(ConnectionError):
    """A process is dead, hangs, or is slower than the timeout; the group is of no more use."""


_OF_USERS: dict[str, type[ValueError]] = {"CheckpointError": CheckpointError, "ValueError": ValueError}
"""Errors that keep their kind on their way to other processes; OSError does too."""


class _Failure(NamedTuple):
    """An exception as it travels to other processes."""

    kind: str
    errno: int
    reason: str


class _Answer(NamedTuple):
    """What one process tells the others."""

    doing: str
    result: object = None
    failure: _Failure | None = None


def storage_group(timeout: timedelta = TIMEOUT) -> dist.ProcessGroup | None:
    """A gloo group of all processes for storage alone, or None where there is one process; all must call this."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timeout)


class Collective:
    """The processes of a group, at work on one path; a single process is its own only peer.

    Args:
        group: the process group; None is the default group, or one process where none is initialised.
    """

    def __init__(self, path: Path, group: dist.ProcessGroup | None = None) -> None:
        self.path, self.group = path, group
        together = group is not None or (dist.is_available() and dist.is_initialized())
        self.size = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0

    def gather(self, doing: str, work: Callable[[], T]) -> list[T]:
        """Do `work` on every process; answer the results of all, by rank.

        Every process comes back only when all have ended. What is exchanged is pickled, among processes of one program.

        Args:
            doing: what this is, for messages; processes that are at different work say so.

        Raises:
            OSError, CheckpointError, ValueError: on every process, what failed on any, with its rank.
            RuntimeError: likewise, for errors of other kinds; or the processes were at different work.
            LostProcess: another did not answer.
        """
        if self.size == 1:
            return [work()]
        cause = None
        try:
            answer = _Answer(doing, work())
        except LostProcess:  # nobody is left to talk to
            raise
        except Exception as error:
            cause, answer = error, _Answer(doing, failure=_describe(error))
        answers: list[_Answer] = [answer] * self.size
        try:
            dist.all_gather_object(answers, answer, group=self.group)
        except RuntimeError as error:
            reason = f"lost a process while {doing}; it is dead, or slower than the timeout"
            raise LostProcess(errno.ECONNRESET, reason, str(self.path)) from error
        failures = {rank: answer.failure for rank, answer in enumerate(answers) if answer.failure is not None}
        if failures:
            raise self._joint_error(failures) from cause
        doings = [answer.doing for answer in answers]
        if len(set(doings)) > 1:
            raise RuntimeError(f"the processes are not at the same work: {dict(enumerate(doings))}")
        return [answer.result for answer in answers]  # type: ignore[misc]

    def run_on_all(self, doing: str, work: Callable[[], T]) -> T:
        """Do `work` on every process; answer this one's result, or raise on all what failed on any (see `gather`)."""
        results: list[T] = []
        self.gather(doing, lambda: results.append(work()))
        return results[0]

    def first(self, doing: str, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 alone; answer its result everywhere, or raise everywhere (see `gather`)."""
        return self.gather(doing, lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _joint_error(self, failures: dict[int, _Failure]) -> Exception:
        first = next(iter(failures.values()))
        alike = [rank for rank, failure in failures.items() if failure == first]
        others = [rank for rank in failures if rank not in alike]
        reason = f"{_named(alike)}: {first.reason}" + (f" (and other errors on {_named(others)})" if others else "")
        if first.kind == "OSError":
            return OSError(first.errno, reason, str(self.path))
        if first.kind in _OF_USERS:  # where all have seen the same, no rank is to blame
            return _OF_USERS[first.kind](first.reason if len(alike) == self.size else reason)
        return RuntimeError(f"{reason} ({first.kind})")


def _named(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + listed([str(rank) for rank in ranks])


def _describe(error: Exception) -> _Failure:
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        return _Failure("OSError", error.errno or errno.EIO, f"{error.strerror or error}{place}")
    kind = next((name for name, known in _OF_USERS.items() if isinstance(error, known)), type(error).__name__)
    return _Failure(kind, 0, _one_line(error))


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first few names, and how many more."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
