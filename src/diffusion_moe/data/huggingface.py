"""Data sets of the Hugging Face hub, or saved on the disk by `datasets`. No code that comes with one is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..config import DataConfig
from .decoding import image_suffixes
from .folder import read_folder
from .image_table import ImageFile, ImageTable, as_captions
from .listing import natural_key


def read_huggingface(config: DataConfig) -> ImageTable:
    """Images of one split, from the columns that the recipe names.

    Raises:
        ValueError: the data set, the split or a column is missing, or of another type.
    """
    if _is_image_folder(Path(str(config.path))):
        return read_folder(_as_folder(config))
    datasets.disable_progress_bars()
    table, notes = _load(config)
    for option in ("image_column", "label_column", "caption_column"):
        column = getattr(config, option)
        if column is not None and column not in table.column_names:
            raise ValueError(
                f"data.{option} is {column}, but {config.path} has the columns {', '.join(table.column_names)}"
            )
    feature = table.features[config.image_column]
    if not _may_be_images(feature):
        raise ValueError(f"data.image_column {config.image_column} of {config.path} holds {feature}")
    images = table.select_columns([config.image_column]).cast_column(config.image_column, datasets.Image(decode=False))
    labels, class_names = _classes(table, config.label_column)
    column = config.caption_column
    return ImageTable(
        image=partial(_image, images, config.path),
        names=partial(_names, images, config.path),
        labels=labels,
        class_names=class_names,
        captions=None if column is None else partial(_captions, table.select_columns([column]), column),
        notes=notes,
    )


def _image(table: Any, dataset: str | None, index: int) -> ImageFile:
    """Image of a row; a table's only column holds mappings of `path` and `bytes`."""
    (image,) = table[index].values()
    image = image or {"path": None, "bytes": b""}
    if image["bytes"] is None:
        return ImageFile(str(image["path"]), str(image["path"]))
    path = f" ({image['path']})" if image["path"] else ""
    return ImageFile(f"row {index} of {dataset}{path}", image["bytes"])


def _names(table: Any, dataset: str | None) -> Iterator[str]:
    """Paths of the images, relative to the data set's folder if they are in it."""
    folder = f"{Path(str(dataset)).absolute()}/"
    for chunk in table.data[table.column_names[0]].chunks:
        for name in chunk.field("path").to_pylist():
            yield (name or "").removeprefix(folder)


def _captions(table: Any, column: str, index: int) -> tuple[str, ...]:
    """Captions of a row, from a column of texts, or of lists of texts."""
    try:
        return as_captions(table[index][column])
    except ValueError as error:
        raise ValueError(f"data.caption_column {column} in row {index}: {error}") from error


def _load(config: DataConfig) -> tuple[Any, list[str]]:
    """The split as a `datasets.Dataset`, and lines for the user."""
    assert config.path is not None
    path = Path(config.path)
    local = path.exists()
    if local and config.revision is not None:
        raise ValueError(f"data.revision is {config.revision}, but {path} is no data set of the hub; remove it")
    what = f"data.path {path}" if local else f"data.path {path} is not there, and the hub's data set of that name"
    try:
        if _is_saved(path):
            return _saved_split(datasets.load_from_disk(str(path)), config), []
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split=config.split), []
        notes = _split_notes(path, config) if local else []
        table = datasets.load_dataset(config.path, name=config.subset, split=config.split, revision=config.revision)
        return table, notes
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{what} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _is_saved(path: Path) -> bool:
    """True for a folder that `save_to_disk` made."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _is_image_folder(path: Path) -> bool:
    """True for a folder of image files; `datasets` would leave out some by words in their names."""
    if not path.is_dir() or _is_saved(path):
        return False
    endings = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    return endings.isdisjoint({".parquet", ".arrow", ".tar"}) and not endings.isdisjoint(image_suffixes())


def _as_folder(config: DataConfig) -> DataConfig:
    """Settings that read the same data as a folder of images, whose columns are always `image` and `label`."""
    usual = DataConfig(kind="folder", path=config.path)
    for name, allowed in (("image_column", ("image",)), ("label_column", ("label", None))):
        if getattr(config, name) not in allowed:
            raise ValueError(f"data.{name} is {getattr(config, name)}, but {config.path} has the columns image, label")
    for name in ("split", "subset", "revision"):
        if getattr(config, name) != getattr(usual, name):
            raise ValueError(
                f"data.{name} is {getattr(config, name)}, but {config.path} is a folder of images; remove it"
            )
    classes = "none" if config.label_column is None else config.classes
    return replace(config, kind="folder", label_column=usual.label_column, classes=classes)


def _split_notes(path: Path, config: DataConfig) -> list[str]:
    """Lines on what `datasets` leaves out of a folder: it finds splits by words in the files' names."""
    tables = {str(file.absolute()) for file in path.rglob("*.parquet") if not file.name.startswith(".")}
    splits = datasets.load_dataset_builder(str(path), name=config.subset).config.data_files or {}
    used = {str(Path(str(file)).absolute()) for files in splits.values() for file in files}
    unused = sorted(tables - used)
    name = config.split.partition("[")[0]
    others = [f"{split} ({len(files)} files)" for split, files in splits.items() if str(split) != name]
    notes = [f"{path}: {len(unused)} parquet files belong to no split, as {unused[0]}"] if unused else []
    if others:
        notes.append(f"{path}: the split {name} is read; there are also {', '.join(others)}")
    return notes


def _saved_split(saved: Any, config: DataConfig) -> Any:
    if not isinstance(saved, datasets.DatasetDict):
        if config.split not in ("train", str(saved.split)):
            raise ValueError(f"data.split is {config.split}, but it was saved without splits; remove it")
        return saved
    if config.split not in saved:
        raise ValueError(f"data.split is {config.split}, but it has the splits {', '.join(saved)}")
    return saved[config.split]


def _may_be_images(feature: Any) -> bool:
    """True for images, encoded files, paths, or mappings of both."""
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary", "string", "large_string")
    return isinstance(feature, datasets.Image)


def _classes(table: Any, column: str | None) -> tuple[np.ndarray, list[str]]:
    """Labels, and class names: the feature's own, or the sorted distinct labels; without a column a single class."""
    if column is None:
        return np.zeros(len(table), dtype=np.int64), ["all"]
    what = f"data.label_column {column}"
    feature = table.features[column]
    values = table.select_columns([column])[:][column]
    named = isinstance(feature, datasets.ClassLabel)
    if any(value is None or (named and value < 0) for value in values):
        raise ValueError(f"{what} is empty (null or -1) in some rows; choose another data.split")
    if named:
        return np.array(values, dtype=np.int64), list(feature.names)
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"{what} holds {feature}; give a column of whole numbers or names, or null for no classes")
    names = sorted(set(values), key=lambda value: natural_key(value) if isinstance(value, str) else (value,))
    labels = {name: label for label, name in enumerate(names)}
    return np.array([labels[value] for value in values], dtype=np.int64), [str(name) for name in names]
