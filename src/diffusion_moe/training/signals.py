"""Ctrl-C and SIGTERM as requests that the loop answers between two steps, in limited time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ECHO_SECONDS = 2.0
"""A scheduler and torchrun may both pass one request on: a signal so soon after the first says nothing new."""
SHOW_CURSOR = b"\x1b[?25h"
"""What a terminal needs after a progress bar."""


@contextmanager
def requests_to_stop(limit_seconds: float) -> Iterator[list[int]]:
    """The list fills with SIGINT or SIGTERM as they come.

    The process ends at once, with exit status 128 + signal, when the limit has passed since the first, or on a second.
    """
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    first = 0.0
    timer: threading.Timer | None = None

    def note(number: int, frame: object) -> None:
        nonlocal first, timer
        if not received:
            first = time.monotonic()
            timer = threading.Timer(limit_seconds, leave, (number, f"could not stop within {limit_seconds:g} s"))
            timer.daemon = True
            timer.start()
        elif time.monotonic() - first > ECHO_SECONDS:
            leave(number, "stopped at once")
        received.append(number)

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
        if timer is not None:
            timer.cancel()


def leave(number: int, why: str) -> None:
    """End the process at once: a checkpoint that is being written is lost, finished ones are not."""
    text = f"diffusion-moe: {why}; what was saved before stays. Run the same command again to go on.\n"
    os.write(2, (SHOW_CURSOR if sys.stderr.isatty() else b"") + text.encode())
    os._exit(128 + number)
