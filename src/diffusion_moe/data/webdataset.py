"""WebDataset tars, read in any order: files of one sample share their name up to the first dot of the last part.

The headers of the tars are read once; an image is then read at its place. Captions are small and kept.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .huggingface import as_captions
from .table import Table

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm")
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

    tars: Sequence[Path]
    places: Sequence[Place]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> dict[str, dict[str, Any]]:
        place = self.places[row]
        with self.tars[place.tar].open("rb") as file:
            file.seek(place.offset)
            return {"image": {"path": self.name(row), "bytes": file.read(place.size)}}

    def name(self, row: int) -> str:
        """The image's name, with its tar's."""
        place = self.places[row]
        return f"{self.tars[place.tar].name}/{place.name}"


def read_webdataset(path: Path, caption_column: str | None) -> Table:
    """The samples that have an image, in the order of the tars' names and of their places in them.

    Args:
        path: a tar, or a folder of tars. caption_column: `txt`, the file of that ending; or a key of the json file,
            whose value is a text or a list of texts.

    Raises:
        ValueError: there are no tars or images, a tar cannot be read, or a sample has no caption.
    """
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not tars:
        raise ValueError(f"data.path {path} holds no .tar files; give a tar, or a folder of tars")
    places, captions, labels = [], [], []
    for number, tar in enumerate(tars):
        for sample in _samples(number, tar):
            if sample.image is None:
                continue
            places.append(sample.image)
            labels.append(int(sample.texts.get(LABEL, b"0") or 0))
            if caption_column is not None:
                captions.append(_captions(sample, caption_column, tar))
    if not places:
        raise ValueError(f"data.path {path} holds no images; samples need a file ending in {', '.join(IMAGES)}")
    count = max(labels) + 1
    names = [str(i) for i in range(count)] if count > 1 else ["all"]
    return Table(TarRows(tars, places), np.array(labels, dtype=np.int64), names, captions if caption_column else None)


@dataclass
class _Sample:
    image: Place | None
    texts: dict[str, bytes]
    name: str


def _samples(number: int, path: Path) -> list[_Sample]:
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                sample = samples.setdefault(f"{folder}{slash}{stem}", _Sample(None, {}, f"{folder}{slash}{stem}"))
                if ending.lower() in IMAGES:
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
