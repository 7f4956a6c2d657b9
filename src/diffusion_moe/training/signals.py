"""Ctrl-C and SIGTERM as requests to stop, which the loop answers between two steps, in limited time."""

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
"""A second signal within this time is the same request: a scheduler and torchrun may both forward one."""
SHOW_CURSOR = b"\x1b[?25h"
"""Terminal code that undoes the hidden cursor of a progress bar."""
STOPS = (signal.SIGINT, signal.SIGTERM)
END = 0
"""Sent to the watching thread to end it; not a signal's number."""


@contextmanager
def requests_to_stop(limit_seconds: float) -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM are appended as they arrive.

    The process ends at once, with exit status 128 + signal, `limit_seconds` after the first signal or on a second one,
    even while it waits in a collective for a process that does not answer.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # the caller handles its signals
        yield received
        return
    # Python calls a handler only when the main thread returns to the interpreter, which it does not while it waits in a
    # collective. The numbers of signals are written into this pipe at once.
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
    """End the process in time, whatever its main thread does."""
    asked, first = 0, 0.0
    while True:
        left = max(0.0, first + limit_seconds - time.monotonic()) if asked else None
        if not select.select([reader], [], [], left)[0]:
            leave(128 + asked, f"could not stop within {limit_seconds:g} s")
        for number in os.read(reader, 64):
            if number == END:
                return
            if number not in STOPS:
                continue
            if asked and time.monotonic() - first > ECHO_SECONDS:
                leave(128 + number, "stopped at once")
            if not asked:
                asked, first = number, time.monotonic()


def torchrun_has_ended() -> Callable[[], bool]:
    """A function that returns True once the torchrun that started this process has ended, as when it was killed."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return lambda: False
    parent = os.getppid()
    return lambda: os.getppid() != parent


def leave(status: int, why: str) -> None:
    """End the process at once: a checkpoint that is being written is lost, finished ones are kept.

    Args:
        status: its exit status.
        why: begins the line that it prints.
    """
    text = f"diffusion-moe: {why}; finished checkpoints are kept. Run the same command again to resume.\n"
    os.write(2, (SHOW_CURSOR if sys.stderr.isatty() else b"") + text.encode())
    os._exit(status)
