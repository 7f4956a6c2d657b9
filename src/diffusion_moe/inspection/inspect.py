"""Look at a data set before training on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..data.decoding import decode_pixels, parse_background
from ..data.image_table import Table
from ..data.reading import read_table
from ..data.splits import split_rows
from ..log import Log
from .contact_sheet import write_contact_sheet
from .examine import examine_row, for_each
from .options import InspectOptions
from .report import Report, equal_files

SHEET = "contact-sheet.png"
LONG = 500
"""From so many images on there is a progress bar."""


def inspect(config: DataConfig, options: InspectOptions, log: Log) -> Report:
    """Read every file of a data set, say what training would see of it, and write what the options ask for.

    Raises:
        ValueError: the data cannot be listed, or is not of image files.
    """
    if config.kind not in ("folder", "huggingface", "webdataset"):
        raise ValueError(f"data.kind is {config.kind}; inspect looks at folder, huggingface and webdataset")
    if config.buckets and options.pixels is not None:
        raise ValueError("data.buckets makes images of several sizes, which --pixels cannot hold; leave one out")
    parse_background(config.background)
    table = read_table(config)
    rows = range(len(table.rows))
    with _progress("reading", len(rows)) as progress:
        examined = list(for_each(table, rows, examine_row, progress))
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[split_rows(table, config.test_fraction, "test")] = True
    report = Report(config, table, held_out, examined, equal_files(examined))
    readable = np.array([not found.problem for found in examined])
    written = []
    if options.output is not None:
        write_contact_sheet(options.output / SHEET, config, table, readable)
        written.append(options.output / SHEET)
    if options.pixels is not None:
        _write_pixels(options.pixels, report, readable)
        written.append(options.pixels)
    if options.json:
        log(json.dumps(report.to_dict(), indent=2))
    else:
        for line in [*report.lines(), *(f"wrote {path}" for path in written)]:
            log(line)
    return report


def _write_pixels(path: Path, report: Report, readable: np.ndarray) -> None:
    config, rows = report.config, np.flatnonzero(readable)
    size = (config.image_size, config.image_size, config.channels)
    images = np.empty((len(rows), *size), np.uint8)
    work = partial(_pixels_of, size=size, background=parse_background(config.background))
    with _progress("decoding", len(rows)) as progress:
        for place, pixels in enumerate(for_each(report.table, rows.tolist(), work, progress)):
            images[place] = pixels
    files = np.array([report.name(int(row)) for row in rows], dtype=np.str_)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, labels=report.table.labels[rows], files=files)


def _pixels_of(table: Table, row: int, size: tuple[int, int, int], background: tuple[int, int, int]) -> np.ndarray:
    return decode_pixels(table.rows[row].source, *size, background)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal and the work is long."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or total < LONG) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
