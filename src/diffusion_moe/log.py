"""Lines for people: the type of functions that take them, such as `print`, and lines of progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Log = Callable[[str], None]
LOG_EVERY = 10.0
"""Seconds between lines of progress."""


@dataclass
class ProgressLog:
    """Lines of progress on many images, with an estimate of the time left."""

    total: int
    log: Log
    done_before: int = 0
    """Images that were done when this call began."""
    verb: str = ""
    """Beginning of each line."""
    began: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)

    def update(self, done: int) -> None:
        """Log a line if the last one is long ago."""
        now = time.monotonic()
        if now - self.logged < LOG_EVERY or done in (self.done_before, self.total):
            return
        rate = (done - self.done_before) / (now - self.began)
        left = _duration((self.total - done) / rate)
        self.log(f"{self.verb}{done} of {self.total} images; {rate:.3g} a second; {left} left")
        self.logged = now


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
