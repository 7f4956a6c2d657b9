"""Looking at every file of a table: size, mode, contents, and whether it can be read.

Most files are not decoded for that: the checksums of a PNG and the end of a JPEG show that they are whole. Whatever is
not shown to be whole is decoded, as training would.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from ..data.decoding import decode_image, open_image, upright_size
from ..data.image_table import Table

CHUNK = 64
"""Images that a process looks at in one go."""
Answer = TypeVar("Answer")


class Examined(NamedTuple):
    """One image file."""

    width: int
    """In pixels, upright; 0 if unknown."""
    height: int
    mode: str
    """Pillow's name of the mode; empty if unknown."""
    sha256: bytes
    """Of the file's content."""
    problem: str = ""
    """Why it cannot be read; empty if it can."""


def examine(content: bytes) -> Examined:
    """Look at one file."""
    digest, width, height, mode = hashlib.sha256(content).digest(), 0, 0, ""
    try:
        with open_image(content) as image:
            height, width = upright_size(image)
            mode = image.mode
            whole = _is_whole(image, content)
        if not whole:
            decode_image(content, 3)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        return Examined(width, height, mode, digest, " ".join(str(error).split()) or type(error).__name__)
    return Examined(width, height, mode, digest)


def _is_whole(image: Image.Image, content: bytes) -> bool:
    """Whether a file is surely complete; False: decoding it will show."""
    if image.format == "PNG":
        try:
            image.verify()
        except Exception:  # decoding gives the reason that training would
            return False
        return True
    # After the beginning of the last scan comes the end of the image, unless it is cut off.
    return image.format == "JPEG" and content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")


def for_each(
    table: Table, rows: Sequence[int], work: Callable[[Table, int], Answer], progress: Callable[[int], None]
) -> Iterator[Answer]:
    """Answers of `work` for rows of a table, in order, on all processors where there are many.

    Args:
        table: given to each process by fork.
        rows: which to work on.
        work: a function of a module, called as work(table, row).
        progress: receives how many rows are done.

    Raises:
        ChildProcessError: a process was killed.
    """
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    processes = min(len(os.sched_getaffinity(0)), len(chunks)) if sys.platform == "linux" else 1
    if processes < 2:
        for done, row in enumerate(rows, start=1):
            yield work(table, row)
            progress(done)
        return
    done = 0
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), initializer=_begin, initargs=(table, work)
    ) as pool:
        try:
            for answers in pool.map(_work_on, chunks):
                yield from answers
                done += len(answers)
                progress(done)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                0, "a process that reads images was killed; if memory is short, free some"
            ) from error


_given: dict[str, Any] = {}
"""In a process that works for another: the table and the work."""


def _begin(table: Table, work: Callable[[Table, int], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    _given.update(table=table, work=work)


def _work_on(rows: Sequence[int]) -> list[Any]:
    return [_given["work"](_given["table"], row) for row in rows]


def examine_row(table: Table, row: int) -> Examined:
    """Look at one file of a table."""
    try:
        content = table.rows[row].content()
    except OSError as error:
        return Examined(0, 0, "", b"", error.strerror or str(error))
    return examine(content)
