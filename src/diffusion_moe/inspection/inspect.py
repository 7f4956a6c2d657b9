"""Inspection of a data set before training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from ..config import DataConfig
from ..data.decoding import decode_pixels, parse_background
from ..data.image_table import ImageTable
from ..data.load import read_table
from ..log import Log
from .contact_sheet import write_contact_sheet
from .examine import examine_image, map_images
from .options import InspectOptions
from .report import Report, equal_files

SHEET = "contact-sheet.png"
MIN_FOR_BAR = 500
"""Least number of images for a progress bar."""


def inspect(config: DataConfig, options: InspectOptions, log: Log) -> Report:
    """Read every file of a data set, report on it, and write the files that the options name.

    Raises:
        ValueError: the data cannot be listed, or does not consist of image files.
    """
    if config.kind not in ("folder", "huggingface", "webdataset"):
        raise ValueError(f"data.kind is {config.kind}; inspect looks at folder, huggingface and webdataset")
    if config.buckets and options.pixels is not None:
        raise ValueError("data.buckets makes images of several sizes, which --pixels cannot hold; remove one")
    parse_background(config.background)
    table = read_table(config)
    indices = range(len(table.labels))
    with _progress("reading", len(indices)) as progress:
        examined = list(map_images(table, indices, examine_image, progress))
    held_out = np.zeros(len(indices), dtype=bool)
    held_out[table.indices(config.test_fraction, "test")] = True
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
    config = report.config
    indices = np.flatnonzero(readable)
    size = (config.image_size, config.image_size, config.channels)
    images = np.empty((len(indices), *size), np.uint8)
    work = partial(_pixels_of, size=size, background=parse_background(config.background))
    with _progress("decoding", len(indices)) as progress:
        for i, pixels in enumerate(map_images(report.table, indices.tolist(), work, progress)):
            images[i] = pixels
    files = np.array([report.name(index) for index in indices.tolist()], dtype=np.str_)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, labels=report.table.labels[indices], files=files)


def _pixels_of(
    table: ImageTable, index: int, size: tuple[int, int, int], background: tuple[int, int, int]
) -> np.ndarray:
    return decode_pixels(table.image(index).source, *size, background)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal and there are many images."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or total < MIN_FOR_BAR) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
