"""Lines for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..log import Log


def log(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


@contextmanager
def torchrun_log() -> Iterator[Log]:
    """Join torchrun's processes, if there are any; of several, only the main one logs."""
    from ..distributed import is_main, torchrun_processes

    with torchrun_processes():
        yield log if is_main() else lambda text: None
