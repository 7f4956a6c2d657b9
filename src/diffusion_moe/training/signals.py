"""Ctrl-C and SIGTERM as requests that the loop answers between two steps, in limited time."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ECHO_SECONDS = 2.0
"""A scheduler and torchrun may both pass one request on: a signal so soon after the first says nothing new."""
SHOW_CURSOR = b"\x1b[?25h"
"""What a terminal needs after a progress bar."""
STOPS = (signal.SIGINT, signal.SIGTERM)
END = 0
"""The number of no signal."""


@contextmanager
def requests_to_stop(limit_seconds: float) -> Iterator[list[int]]:
    """The list fills with SIGINT or SIGTERM as they come.

    The process ends at once, with exit status 128 + signal, when the limit has passed since the first, or on a second:
    also while it waits in a collective for a process that does not answer.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # the caller handles its signals
        yield received
        return
    # Python calls a handler only when the main thread comes back to it, which in a collective takes another process'
    # answer. The numbers of signals are written into this pipe at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watch = threading.Thread(target=_watch, args=(reader, limit_seconds), name="requests to stop", daemon=True)
    watch.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {name: signal.signal(name, lambda number, frame: received.append(number)) for name in STOPS}
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(before)
        os.write(writer, bytes([END]))
        watch.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, limit_seconds: float) -> None:
    """End the process in time, whatever its main thread is at."""
    asked, first = 0, 0.0
    while True:
        left = max(0.0, first + limit_seconds - time.monotonic()) if asked else None
        if not select.select([reader], [], [], left)[0]:
            leave(asked, f"could not stop within {limit_seconds:g} s")
        for number in os.read(reader, 64):
            if number == END:
                return
            if number not in STOPS:
                continue
            if asked and time.monotonic() - first > ECHO_SECONDS:
                leave(number, "stopped at once")
            if not asked:
                asked, first = number, time.monotonic()


def torchrun_is_gone() -> Callable[[], bool]:
    """Tells whether torchrun started this process and has ended without it, as when it was killed."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return lambda: False
    parent = os.getppid()
    return lambda: os.getppid() != parent


def leave(number: int, why: str) -> None:
    """End the process at once: a checkpoint that is being written is lost, finished ones are not."""
    text = f"diffusion-moe: {why}; what was saved before stays. Run the same command again to go on.\n"
    os.write(2, (SHOW_CURSOR if sys.stderr.isatty() else b"") + text.encode())
    os._exit(128 + number)
