"""Ctrl-C and SIGTERM as requests that the loop answers between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def requests_to_stop() -> Iterator[list[int]]:
    """The list fills with SIGINT or SIGTERM as they come; a second one acts at once."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        for name, handler in previous.items():
            signal.signal(name, handler)

    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            previous[name] = signal.signal(name, note)
    except ValueError:  # not in the main thread: the caller handles its signals
        previous.clear()
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
