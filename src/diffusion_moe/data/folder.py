"""A folder of images as a table: files by `listing`, captions out of its metadata files."""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from .image_table import ImageFile, Table, as_captions
from .listing import Listing, list_images, printable

NO_CAPTION = "images without a line in the metadata files"


@dataclass
class FolderRows:
    """The files of a listing."""

    folder: Path
    files: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> ImageFile:
        path = f"{self.folder}/{self.files[row]}"
        return ImageFile(printable(path), path)

    def names(self) -> Iterator[str]:
        """Paths in the folder."""
        return iter(self.files)


def read_folder(config: DataConfig) -> Table:
    """List a folder; nothing is decoded.

    Raises:
        ValueError: the folder is missing or empty, has no classes, or captions are asked for and cannot be read.
    """
    assert config.path is not None
    try:
        listing = list_images(Path(config.path), config.classes or ("none" if config.caption_column else "top"))
    except ValueError as error:
        raise ValueError(f"data.path {error}") from error
    captions = None
    if config.caption_column is not None:
        listing, captions = _with_captions(listing, config.caption_column)
    return Table(
        FolderRows(listing.folder, listing.files),
        listing.labels,
        listing.class_names,
        captions,
        listing.held_out,
        listing.notes(),
        tuple(listing.left_out.counts.items()),
    )


def _with_captions(listing: Listing, column: str) -> tuple[Listing, list[tuple[str, ...]]]:
    """The images that a metadata file describes, and their captions.

    Raises:
        ValueError: there is no such file, it cannot be read, lacks the column, or describes none of the images.
    """
    if not listing.metadata:
        raise ValueError(
            f"data.path {listing.folder} holds no metadata.jsonl, where data.caption_column {column} would be; "
            f'write one with a line {{"file_name": ..., "{column}": ...}} for each image'
        )
    captions: dict[str, tuple[str, ...]] = {}
    for metadata in listing.metadata:
        inside = metadata.rpartition("/")[0]
        for name, text in _captions_of(listing.folder / metadata, column):
            file = posixpath.normpath(f"{inside}/{name}".lstrip("/"))
            if file in captions:
                raise ValueError(f"{listing.folder / metadata} describes {file}, which is described before; remove one")
            captions[file] = text
    known = np.array([file in captions for file in listing.files])
    absent = sorted(captions.keys() - set(listing.files))
    if absent:
        raise ValueError(
            f"the metadata files of {listing.folder} describe {len(absent)} images that are not listed, as "
            f"{absent[0]}; add the files, or remove the lines"
        )
    if not known.any():
        raise ValueError(f"the metadata files of {listing.folder} describe none of its {len(known)} images; add lines")
    if not known.all():
        names = [file for file, yes in zip(listing.files, known) if not yes]
        for name in names:
            listing.left_out.add(NO_CAPTION, name)
    described = replace(
        listing,
        files=[file for file, yes in zip(listing.files, known) if yes],
        labels=listing.labels[known],
        held_out=None if listing.held_out is None else listing.held_out[known],
    )
    return described, [captions[file] for file in described.files]


def _captions_of(path: Path, column: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """File name and captions of each line of a metadata file."""
    for number, row in enumerate(_rows_of(path), start=1):
        if "file_name" not in row or column not in row:
            missing = "file_name" if "file_name" not in row else column
            option = "" if missing == "file_name" else f"data.caption_column is {column}, but "
            raise ValueError(
                f"{option}{path} has the columns {', '.join(map(str, row))} in row {number}, and no {missing}"
            )
        try:
            yield str(row["file_name"]), as_captions(row[column])
        except ValueError as error:
            raise ValueError(f"{column} in row {number} of {path}: {error}") from error


def _rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)
        else:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError(f"{line.strip()[:40]} is not an object")
                        yield row
    except (OSError, ValueError, csv.Error) as error:  # of json, UTF-8 and pyarrow too
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
