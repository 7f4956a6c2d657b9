"""Examination of every image file: size, mode, hash, and whether it can be read.

The checksums of a PNG and the end of a JPEG show that the file is whole. Other files are decoded, as in training.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from ..data.decoding import decode_image, open_image, upright_size
from ..data.image_table import ImageTable

CHUNK = 64
"""Images that a process takes at a time."""
Result = TypeVar("Result")


class Examined(NamedTuple):
    """One image file."""

    width: int
    """Width in pixels, upright; 0 if unknown."""
    height: int
    mode: str
    """Pillow's name of the mode; empty if unknown."""
    sha256: bytes
    """Hash of the file's content; empty if it cannot be opened."""
    problem: str = ""
    """Reason why it cannot be read; empty if it can."""


def examine_image(table: ImageTable, index: int) -> Examined:
    """Examine one file of a table."""
    try:
        source = table.image(index).source
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        return Examined(0, 0, "", b"", error.strerror or str(error))
    return examine(content)


def examine(content: bytes) -> Examined:
    """Examine the content of one file."""
    found = Examined(0, 0, "", hashlib.sha256(content).digest())
    try:
        with open_image(content) as image:
            height, width = upright_size(image)
            found = found._replace(width=width, height=height, mode=image.mode)
            whole = _is_whole(image, content)
        if not whole:
            decode_image(content, 3)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        return found._replace(problem=" ".join(str(error).split()) or type(error).__name__)
    return found


def _is_whole(image: Image.Image, content: bytes) -> bool:
    """True if a file is surely complete; if False only decoding can tell."""
    if image.format == "PNG":
        try:
            image.verify()
        except Exception:  # decoding gives the reason that training would
            return False
        return True
    # The image's end marker follows the start of its last scan, unless the file is cut.
    return image.format == "JPEG" and content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")


def map_images(
    table: ImageTable,
    indices: Sequence[int],
    work: Callable[[ImageTable, int], Result],
    progress: Callable[[int], None],
) -> Iterator[Result]:
    """Results of `work` for images of a table, in order; many images are shared among all processors.

    Args:
        table: reaches each process by fork.
        indices: the images.
        work: called as work(table, index).
        progress: receives the number of images done.

    Raises:
        ChildProcessError: a process was killed.
    """
    processes = min(len(os.sched_getaffinity(0)), math.ceil(len(indices) / CHUNK)) if sys.platform == "linux" else 1
    with ExitStack() as stack:
        results: Iterator[Result] = map(partial(work, table), indices)
        if processes > 1:
            context = multiprocessing.get_context("fork")
            pool = stack.enter_context(ProcessPoolExecutor(processes, context, _begin, (table, work)))
            results = pool.map(_work_on, indices, chunksize=CHUNK)
        try:
            for done, result in enumerate(results, start=1):
                yield result
                progress(done)
        except BrokenProcessPool as error:
            message = "a process that reads images was killed; if memory is short, free some"
            raise ChildProcessError(0, message) from error


_given: dict[str, Any] = {}
"""The table and the work, in a process of the pool."""


def _begin(table: ImageTable, work: Callable[[ImageTable, int], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _given.update(table=table, work=work)


def _work_on(index: int) -> Any:
    return _given["work"](_given["table"], index)
