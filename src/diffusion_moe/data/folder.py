"""A folder of images as a table: files from `listing`, captions from its metadata files."""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from .image_table import ImageFile, ImageTable, as_captions
from .listing import Listing, list_images, printable

NO_CAPTION = "images without a line in the metadata files"


def read_folder(config: DataConfig) -> ImageTable:
    """List a folder; no image is opened.

    Raises:
        ValueError: the folder is missing or empty, has no classes, or its captions cannot be read.
    """
    assert config.path is not None
    if config.made_by is not None and not Path(config.path).is_dir():
        raise ValueError(f"data.path {config.path} is not a folder; make it with `{config.made_by}`")
    try:
        listing = list_images(Path(config.path), config.classes or ("none" if config.caption_column else "top"))
    except ValueError as error:
        raise ValueError(f"data.path {error}") from error
    captions: list[tuple[str, ...]] = []
    if config.caption_column is not None:
        listing, captions = _with_captions(listing, config.caption_column)
    return ImageTable(
        image=partial(_image, listing),
        names=partial(iter, listing.files),
        labels=listing.labels,
        class_names=listing.class_names,
        captions=captions.__getitem__ if captions else None,
        held_out=listing.held_out,
        notes=listing.notes(),
        left_out=listing.left_out.counts,
    )


def _image(listing: Listing, index: int) -> ImageFile:
    path = f"{listing.folder}/{listing.files[index]}"
    return ImageFile(printable(path), path)


def _with_captions(listing: Listing, column: str) -> tuple[Listing, list[tuple[str, ...]]]:
    """The images that the metadata files describe, and their captions.

    Raises:
        ValueError: there is no metadata file, it cannot be read, lacks the column, or describes other images.
    """
    folder = listing.folder
    if not listing.metadata:
        raise ValueError(
            f"data.path {folder} has no metadata.jsonl with data.caption_column {column}; write one with a line "
            f'{{"file_name": ..., "{column}": ...}} for each image'
        )
    captions: dict[str, tuple[str, ...]] = {}
    for metadata in listing.metadata:
        for name, texts in _captions_of(folder / metadata, column):
            file = posixpath.normpath(posixpath.join(posixpath.dirname(metadata), name.lstrip("/")))
            if file in captions:
                raise ValueError(f"{folder / metadata} describes {file}, which is described before; remove one")
            captions[file] = texts
    absent = sorted(captions.keys() - set(listing.files))
    if absent:
        raise ValueError(
            f"the metadata files of {folder} describe {len(absent)} images that are not listed, as {absent[0]}; add "
            "the files, or remove the lines"
        )
    if not captions:
        raise ValueError(f"the metadata files of {folder} describe none of its {len(listing.files)} images; add lines")
    for file in listing.files:
        if file not in captions:
            listing.left_out.add(NO_CAPTION, file)
    described = np.array([file in captions for file in listing.files])
    files = [file for file in listing.files if file in captions]
    held_out = None if listing.held_out is None else listing.held_out[described]
    listing = replace(listing, files=files, labels=listing.labels[described], held_out=held_out)
    return listing, [captions[file] for file in files]


def _captions_of(path: Path, column: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """File name and captions of each line of a metadata file."""
    for number, line in enumerate(_lines_of(path), start=1):
        columns = ", ".join(map(str, line))
        if "file_name" not in line:
            raise ValueError(f"{path} has the columns {columns} in row {number}, and no file_name")
        if column not in line:
            raise ValueError(
                f"data.caption_column is {column}, but {path} has the columns {columns} in row {number}, "
                f"and no {column}"
            )
        try:
            yield str(line["file_name"]), as_captions(line[column])
        except ValueError as error:
            raise ValueError(f"{column} in row {number} of {path}: {error}") from error


def _lines_of(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)
        else:
            with path.open(encoding="utf-8") as file:
                for text in filter(str.strip, file):
                    line = json.loads(text)
                    if not isinstance(line, dict):
                        raise ValueError(f"{text.strip()[:40]} is not an object")
                    yield line
    except (OSError, ValueError, csv.Error) as error:  # of json, UTF-8 and pyarrow too
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
