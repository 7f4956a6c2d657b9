"""Deterministic algorithms (`training.deterministic`), without which a GPU repeats a step to rounding only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cudnn

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Values of the variable with which cuBLAS is deterministic (the manual of cuBLAS, results reproducibility)."""


@contextmanager
def deterministic_algorithms(on_gpu: bool) -> Iterator[None]:
    """Use deterministic algorithms inside the block.

    Torch's operators then add in a fixed order, or raise where they cannot. The backward passes of the flash and the
    memory-efficient attention do so too (pytorch, attention_backward.cu), and cuDNN's attention is not chosen. The
    variable for cuBLAS stays set, because cuBLAS reads it once a process.

    Args:
        on_gpu: prepare CUDA too.

    Raises:
        ValueError: cuBLAS is, or may be, set up otherwise.
    """
    if on_gpu:
        _fix_workspaces()
    before = torch.get_deterministic_debug_mode()
    cudnn_before = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        cudnn.deterministic, cudnn.benchmark = cudnn_before


def _fix_workspaces() -> None:
    """Give cuBLAS workspaces of fixed sizes."""
    value = os.environ.get(VARIABLE)
    if value in WORKSPACES:
        return
    choices = " or ".join(WORKSPACES)
    if value:
        raise ValueError(f"{VARIABLE} is {value}, but training.deterministic needs {choices}; remove the variable")
    if torch.cuda.is_initialized():
        raise ValueError(
            f"training.deterministic is true, but this process uses CUDA already and {VARIABLE} is not set; set it to "
            f"{choices} before the process starts"
        )
    os.environ[VARIABLE] = WORKSPACES[0]
