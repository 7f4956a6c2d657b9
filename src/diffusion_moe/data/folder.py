"""A folder of images: one sub-folder a class, or with captions in `metadata.jsonl`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .huggingface import ColumnCaptions
from .table import Table


def read_folder(folder: Path) -> Table:
    """File paths by row (nothing decoded yet), labels and class names.

    Raises:
        ValueError: the folder is missing, empty or has no class folders.
    """
    if not folder.is_dir():
        raise ValueError(f"data.path {folder} is not a folder; give one with a sub-folder of images for each class")
    if not any(child.is_dir() for child in folder.iterdir()):
        raise ValueError(f"data.path {folder} holds no sub-folders; put the images of each class into one")
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", drop_labels=False)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"data.path {folder} cannot be read as a folder of images: {first_line}") from error
    rows = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    return Table(rows, np.array(table["label"], dtype=np.int64), list(table.features["label"].names))


def read_captioned_folder(folder: Path, column: str) -> Table:
    """Images with captions, of one class: `metadata.jsonl` names a file and its captions in each line.

    Raises:
        ValueError: the folder or the file is missing, or cannot be read.
    """
    if not any((folder / f"metadata.{ending}").is_file() for ending in ("jsonl", "csv", "parquet")):
        raise ValueError(
            f"data.path {folder} holds no metadata.jsonl, where data.caption_column {column} would be; write one "
            f'with a line {{"file_name": ..., "{column}": ...}} for each image'
        )
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"data.path {folder} cannot be read as a folder of images: {first_line}") from error
    if column not in table.column_names:
        raise ValueError(
            f"data.caption_column is {column}, but {folder} has the columns {', '.join(table.column_names)}"
        )
    rows = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    return Table(rows, np.zeros(len(rows), dtype=np.int64), ["all"], ColumnCaptions(table, column))
