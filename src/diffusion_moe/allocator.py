"""What the process keeps on a CPU: freed memory, and compiled products."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
PRODUCT_SHAPES = 16384
"""Shapes of products whose code is kept; 1,024 is oneDNN's own limit."""


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


def keep_compiled_products() -> None:
    """Let oneDNN keep the code of more matrix products; to be called before the first one.

    It compiles a bfloat16 matmul for each shape, and experts take other numbers of rows in each step. Past its
    limit a layer may spend more time on compiling than on multiplying (docs/log.md). What the user has set stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCT_SHAPES))
