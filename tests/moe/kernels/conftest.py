"""The Triton kernels under Triton's interpreter, against the torch code of the operators that call them.

The interpreter must be chosen before triton is first imported, so these tests are collected only where
TRITON_INTERPRET=1 is set: `tests/moe/test_kernels.py` runs them in a process of their own.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest

from diffusion_moe.moe import backend

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="session")
def both() -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """What a function returns with the kernels, and what it returns with torch."""

    def run(function: Callable[[], Any]) -> tuple[Any, Any]:
        with backend.use("triton"):
            kernel = function()
        with backend.use("torch"):
            return kernel, function()

    return run
