"""Start of the processes that load batches.

They are forked from a server, a process without threads or devices: a fork of this process could inherit a lock that
another thread holds at that moment, of CUDA, NCCL, the allocator or the checkpoint writer, and hang.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def start_fork_server() -> None:
    """Start the server, which imports the library while this process does other work; once, later calls do nothing."""
    if START_METHOD == "forkserver":
        from multiprocessing import forkserver

        multiprocessing.set_forkserver_preload([f"{__package__}.fork_server"])
        forkserver.ensure_running()


def begin_worker(then: Callable[[int], None] | None, number: int) -> None:
    """Start a worker: it ends with the process that it loads for, even if that one is killed.

    Torch's workers look at the number of their parent process, which here is the server's. A worker that stayed would
    keep the server alive too.

    Args:
        then: called with the worker's number.
        number: given by torch.
    """
    threading.Thread(target=_end_with_loader, name="end with loader", daemon=True).start()
    if then is not None:
        then(number)


def _end_with_loader() -> None:
    loader = multiprocessing.parent_process()
    assert loader is not None
    loader.join()
    os._exit(0)


class SentDataset:
    """A data set that is pickled once for all workers.

    Tensors are pickled as arrays: multiprocessing would send each as a file descriptor, and captions have thousands.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, sampled: Sequence[Any]) -> Any:
        return self.dataset.__getitems__(sampled)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._pickled,)

    @cached_property
    def _pickled(self) -> bytes:
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(self.dataset)
        return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Reduce a plain tensor on the CPU to an array, if numpy has its dtype; all else as usual."""
        plain = type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad
        if not plain or value.dtype == torch.bfloat16:
            return NotImplemented
        return torch.from_numpy, (value.numpy(),)


def _restore(pickled: bytes) -> SentDataset:
    return SentDataset(pickle.loads(pickled))
