"""Data sets of the Hugging Face hub, or what `datasets` has saved on the disk. No code of theirs is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from .table import Table


def read_huggingface(config: DataConfig) -> Table:
    """One split's images, by the columns that the recipe names.

    Raises:
        ValueError: the data set, the split or a column is not there, or is of another kind.
    """
    import datasets

    datasets.disable_progress_bars()
    table = _load(config)
    for option in ("image_column", "label_column", "caption_column"):
        column = getattr(config, option)
        if column is not None and column not in table.column_names:
            raise ValueError(
                f"data.{option} is {column}, but {config.path} has the columns {', '.join(table.column_names)}"
            )
    rows = table.select_columns([config.image_column])
    if config.image_column != "image":
        rows = rows.rename_column(config.image_column, "image")
    if not _may_be_images(rows.features["image"]):
        raise ValueError(f"data.image_column {config.image_column} of {config.path} holds {rows.features['image']}")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    captions = None if config.caption_column is None else ColumnCaptions(table, config.caption_column)
    if config.label_column is None:
        return Table(rows, np.zeros(len(rows), dtype=np.int64), ["all"], captions)
    return Table(rows, *_classes(table, config.label_column, f"data.label_column {config.label_column}"), captions)


class ColumnCaptions:
    """A column of texts, or of lists of texts, by row."""

    def __init__(self, table: Any, column: str) -> None:
        self.texts, self.column = table.select_columns([column]), column

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> tuple[str, ...]:
        try:
            return as_captions(self.texts[row][self.column])
        except ValueError as error:
            raise ValueError(f"data.caption_column {self.column} in row {row}: {error}") from error


def as_captions(value: Any) -> tuple[str, ...]:
    """One text or a list of them.

    Raises:
        ValueError: it is neither, or the list is empty.
    """
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a text or a list of texts, got {str(value)[:40]!r}")
    return texts


def _load(config: DataConfig) -> Any:
    """The split as a `datasets.Dataset`."""
    import datasets

    assert config.path is not None
    path, local = Path(config.path), Path(config.path).exists()
    if local and config.revision is not None:
        raise ValueError(f"data.revision is {config.revision}, but {path} is no data set of the hub; leave it out")
    where = f"data.path {path}" if local else f"data.path {path} is not there, and the hub's data set of that name"
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_split(datasets.load_from_disk(str(path)), config)
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split=config.split)
        return datasets.load_dataset(config.path, name=config.subset, split=config.split, revision=config.revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _saved_split(saved: Any, config: DataConfig) -> Any:
    import datasets

    if not isinstance(saved, datasets.DatasetDict):
        if config.split not in ("train", str(saved.split)):
            raise ValueError(f"data.split is {config.split}, but it was saved without splits; leave it out")
        return saved
    if config.split not in saved:
        raise ValueError(f"data.split is {config.split}, but it has the splits {', '.join(saved)}")
    return saved[config.split]


def _may_be_images(feature: Any) -> bool:
    """Images, encoded files, paths, or records of both."""
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")


def _classes(table: Any, column: str, what: str) -> tuple[np.ndarray, list[str]]:
    """Labels and class names: the feature's own, or the sorted distinct labels."""
    import datasets

    feature, values = table.features[column], table.select_columns([column])[:][column]
    named = isinstance(feature, datasets.ClassLabel)
    if any(value is None or (named and value < 0) for value in values):
        raise ValueError(f"{what} is empty (null or -1) in some rows; choose another data.split")
    if named:
        return np.array(values, dtype=np.int64), list(feature.names)
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"{what} holds {feature}; give a column of whole numbers or names, or null for no classes")
    names = sorted(set(values))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[value] for value in values], dtype=np.int64), [str(name) for name in names]
