"""A folder of images, one sub-folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
