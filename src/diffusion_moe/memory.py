"""How the process holds memory on a CPU."""

from __future__ import annotations

import ctypes
import sys

# glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the next tensor instead of giving it back to the system.

    A training step frees and takes the same large blocks again and again, and the system hands each out as fresh pages,
    which can cost a quarter of a layer's time (docs/log.md). The process stays as large as it once was. GPU memory is
    not touched.

    Returns:
        Whether the C library took it; False where it is not glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(name, value) for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28))
    )
