"""Data sets of the Hugging Face hub, or what `datasets` has saved on the disk. No code of theirs is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from .decoding import image_suffixes
from .folder import read_folder
from .image_table import ImageFile, Table, as_captions
from .natural import natural_key


def read_huggingface(config: DataConfig) -> Table:
    """One split's images, by the columns that the recipe names.

    Raises:
        ValueError: the data set, the split or a column is not there, or is of another kind.
    """
    import datasets

    if _holds_images(Path(str(config.path))):
        return read_folder(_as_folder(config))
    datasets.disable_progress_bars()
    table, notes = _load(config)
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
    files = HuggingFaceRows(rows.cast_column("image", datasets.Image(decode=False)), str(config.path))
    captions = None if config.caption_column is None else ColumnCaptions(table, config.caption_column)
    if config.label_column is None:
        return Table(files, np.zeros(len(files), dtype=np.int64), ["all"], captions, notes=notes)
    labels, names = _classes(table, config.label_column, f"data.label_column {config.label_column}")
    return Table(files, labels, names, captions, notes=notes)


@dataclass
class HuggingFaceRows:
    """The column `image` of a `datasets.Dataset`: records of `path` and `bytes`."""

    images: Any
    dataset: str
    """For messages."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> ImageFile:
        record = self.images[row]["image"] or {"path": None, "bytes": b""}
        if record["bytes"] is None:
            return ImageFile(str(record["path"]), str(record["path"]))
        inner = f" ({record['path']})" if record["path"] else ""
        return ImageFile(f"row {row} of {self.dataset}{inner}", record["bytes"])

    def names(self) -> Iterator[str]:
        """Paths, in the data set's folder where they lie in it."""
        folder = f"{Path(self.dataset).absolute()}/"
        for chunk in self.images.data["image"].chunks:
            for name in chunk.field("path").to_pylist():
                yield (name or "").removeprefix(folder)


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


def _load(config: DataConfig) -> tuple[Any, list[str]]:
    """The split as a `datasets.Dataset`, and lines for the user."""
    import datasets

    assert config.path is not None
    path, local = Path(config.path), Path(config.path).exists()
    if local and config.revision is not None:
        raise ValueError(f"data.revision is {config.revision}, but {path} is no data set of the hub; leave it out")
    where = f"data.path {path}" if local else f"data.path {path} is not there, and the hub's data set of that name"
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_split(datasets.load_from_disk(str(path)), config), []
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split=config.split), []
        notes = _check_files(path, config) if local else []
        return datasets.load_dataset(
            config.path, name=config.subset, split=config.split, revision=config.revision
        ), notes
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _holds_images(path: Path) -> bool:
    """Whether a path is a folder of image files, of which `datasets` would leave out some by words in their names."""
    if not path.is_dir() or any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return False
    endings = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    return not endings & {".parquet", ".arrow", ".tar"} and bool(endings & image_suffixes())


def _as_folder(config: DataConfig) -> DataConfig:
    """The same data as a folder of images; there the columns are always `image` and `label`."""
    fields: dict[str, Any] = type(config).__dataclass_fields__
    for name, usual in (("image_column", ("image",)), ("label_column", ("label", None))):
        if getattr(config, name) not in usual:
            raise ValueError(f"data.{name} is {getattr(config, name)}, but {config.path} has the columns image, label")
    for name in ("split", "subset", "revision"):
        if getattr(config, name) != fields[name].default:
            raise ValueError(
                f"data.{name} is {getattr(config, name)}, but {config.path} is a folder of images; leave it out"
            )
    return replace(
        config,
        kind="folder",
        classes=None if config.label_column else "none",
        image_column=fields["image_column"].default,
        label_column=fields["label_column"].default,
    )


def _check_files(path: Path, config: DataConfig) -> list[str]:
    """Lines on what `datasets` leaves out of a folder, whose splits it finds by words in the files' names."""
    import datasets

    tables = {str(file.absolute()) for file in path.rglob("*.parquet") if not file.name.startswith(".")}
    splits = datasets.load_dataset_builder(str(path), name=config.subset).config.data_files or {}
    used = {str(Path(str(file)).absolute()) for part in splits.values() for file in part}
    unused, name = sorted(tables - used), config.split.partition("[")[0]
    notes = [f"{path}: {len(unused)} parquet files belong to no split, as {unused[0]}"] if unused else []
    others = [f"{split} ({len(part)} files)" for split, part in splits.items() if str(split) != name]
    return notes + ([f"{path}: the split {name} is read; there are also {', '.join(others)}"] if others else [])


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
    names = sorted(set(values), key=lambda value: natural_key(value) if isinstance(value, str) else (value,))
    number = {name: i for i, name in enumerate(names)}
    return np.array([number[value] for value in values], dtype=np.int64), [str(name) for name in names]
