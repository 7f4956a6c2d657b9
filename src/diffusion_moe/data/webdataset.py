"""WebDataset tars, read in any order: files of one sample share their name up to the first dot of the last part.

The headers of the tars are read once; an image is then read at its place. Captions are small and kept.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import DataConfig
from .decoding import image_suffixes
from .image_table import ImageFile, Table, as_captions
from .natural import natural_key

LABEL = "cls"


class Place(NamedTuple):
    """An image in a tar."""

    tar: int
    name: str
    offset: int
    size: int


@dataclass
class TarRows:
    """What a `Table` asks of its rows, for tars."""

    path: Path
    """The tar or folder of tars, for messages."""
    tars: Sequence[Path]
    places: Sequence[Place]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> ImageFile:
        place = self.places[row]
        with self.tars[place.tar].open("rb") as file:
            file.seek(place.offset)
            return ImageFile(f"row {row} of {self.path} ({self._name(row)})", file.read(place.size))

    def names(self) -> Iterator[str]:
        """Names of the images in their tars."""
        return map(self._name, range(len(self)))

    def _name(self, row: int) -> str:
        place = self.places[row]
        return f"{self.tars[place.tar].name}/{place.name}"


def read_webdataset(config: DataConfig) -> Table:
    """List the samples that have an image, in natural order of the tars' names and as they stand in the tars.

    Captions are those of the file .txt (data.caption_column txt), or the value of a key of the .json file.

    Raises:
        ValueError: there are no tars or images, a tar cannot be read, or a sample has no caption or class.
    """
    assert config.path is not None
    path, column = Path(config.path), config.caption_column
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"), key=lambda tar: natural_key(tar.name))
    if not tars:
        raise ValueError(f"data.path {path} holds no .tar files; give a tar, or a folder of tars")
    left_out = Counter({"files beside the tars": 0 if path.is_file() else len(list(path.iterdir())) - len(tars)})
    places, captions, labels = [], [], []
    for number, tar in enumerate(tars):
        for sample in _samples(number, tar):
            left_out["images of samples that have another"] += sample.further_images
            if sample.image is None:
                left_out["samples without an image"] += 1
                continue
            places.append(sample.image)
            labels.append(_label(sample, tar))
            if column is not None:
                captions.append(_captions(sample, column, tar))
    if not places:
        raise ValueError(f"data.path {path} holds no images; samples need a file that ends in .jpg, .png or the like")
    if None in labels and labels.count(None) < len(labels):
        name = places[labels.index(None)].name
        raise ValueError(f"sample {name} under {path} has no .cls file, but others have; add it, or remove the others")
    numbers = np.array([label or 0 for label in labels], dtype=np.int64)
    count = int(numbers.max()) + 1
    ignored = [(reason, count) for reason, count in left_out.items() if count]
    return Table(
        TarRows(path, tars, places),
        numbers,
        [str(i) for i in range(count)] if count > 1 else ["all"],
        captions if column else None,
        notes=[f"{path}: left out: {', '.join(f'{count} {reason}' for reason, count in ignored)}"] if ignored else [],
        ignored=ignored,
    )


def _label(sample: _Sample, tar: Path) -> int | None:
    """The class that a sample's .cls file gives; None without such a file."""
    text = sample.texts.get(LABEL)
    if text is None:
        return None
    if not text.strip().isdigit():
        raise ValueError(f"sample {sample.name} of {tar} has the class {text[:40]!r}; give a whole number, 0 or more")
    return int(text)


@dataclass
class _Sample:
    name: str
    image: Place | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    further_images: int = 0


def _samples(number: int, path: Path) -> list[_Sample]:
    samples, suffixes = dict[str, _Sample](), image_suffixes()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                sample = samples.setdefault(f"{folder}{slash}{stem}", _Sample(f"{folder}{slash}{stem}"))
                if f".{ending.lower()}" in suffixes:
                    sample.further_images += sample.image is not None
                    sample.image = Place(number, member.name, member.offset_data, member.size)
                elif ending in ("txt", "json", LABEL):
                    content = tar.extractfile(member)
                    assert content is not None
                    sample.texts[ending] = content.read()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar: {error}") from error
    return list(samples.values())


def _captions(sample: _Sample, column: str, tar: Path) -> tuple[str, ...]:
    try:
        if column == "txt":
            return (sample.texts["txt"].decode().strip(),)
        return as_captions(json.loads(sample.texts["json"])[column])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"sample {sample.name} of {tar} has no caption {column!r} ({error!r}); see data.caption_column"
        ) from error
