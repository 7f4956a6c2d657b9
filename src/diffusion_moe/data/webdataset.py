"""WebDataset tars, read in any order. The files of a sample share their path up to the first dot of the file name.

The headers of the tars are read once; images are then read by their offsets. Captions are kept in memory.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import DataConfig
from .decoding import image_suffixes
from .image_table import ImageFile, ImageTable, as_captions
from .listing import natural_key

LABEL = "cls"


class TarMember(NamedTuple):
    """An image in a tar."""

    tar: Path
    name: str
    offset: int
    """First byte of its content in the tar."""
    size: int
    """Bytes."""

    def __str__(self) -> str:
        return f"{self.tar.name}/{self.name}"


@dataclass
class _Sample:
    name: str
    images: list[TarMember] = field(default_factory=list)
    """Its images, of which the last one is read."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Content of the .txt, .json and .cls files, by ending."""


def read_webdataset(config: DataConfig) -> ImageTable:
    """List the samples that have an image, in natural order of the tars' names and in the order of each tar.

    Captions come from the .txt file (data.caption_column txt), or from a key of the .json file.

    Raises:
        ValueError: there are no tars or images, a tar cannot be read, or a sample has no caption or class.
    """
    assert config.path is not None
    path, column = Path(config.path), config.caption_column
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"), key=lambda tar: natural_key(tar.name))
    if not tars:
        raise ValueError(f"data.path {path} holds no .tar files; give a tar, or a folder of tars")
    samples = [sample for tar in tars for sample in _samples(tar)]
    with_image = [sample for sample in samples if sample.images]
    if not with_image:
        raise ValueError(f"data.path {path} holds no images; samples need a file that ends in .jpg, .png or the like")
    labels = [_label(sample) for sample in with_image]
    if None in labels and any(label is not None for label in labels):
        name = with_image[labels.index(None)].name
        raise ValueError(f"{name} has no .cls file, but others have; add it, or remove the others")
    numbers = np.array([label or 0 for label in labels], dtype=np.int64)
    classes = int(numbers.max()) + 1
    counts = {
        "files beside the tars": 0 if path.is_file() else len(list(path.iterdir())) - len(tars),
        "images of samples that have another": sum(len(sample.images) - 1 for sample in with_image),
        "samples without an image": len(samples) - len(with_image),
    }
    left_out = {reason: count for reason, count in counts.items() if count}
    listed = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    members = [sample.images[-1] for sample in with_image]
    return ImageTable(
        image=partial(_image, path, members),
        names=partial(map, str, members),
        labels=numbers,
        class_names=[str(i) for i in range(classes)] if classes > 1 else ["all"],
        captions=None if column is None else [_captions(sample, column) for sample in with_image].__getitem__,
        notes=[f"{path}: left out: {listed}"] if left_out else [],
        left_out=left_out,
    )


def _image(path: Path, members: Sequence[TarMember], index: int) -> ImageFile:
    member = members[index]
    with member.tar.open("rb") as file:
        file.seek(member.offset)
        return ImageFile(f"row {index} of {path} ({member})", file.read(member.size))


def _samples(path: Path) -> list[_Sample]:
    """Samples of one tar, in the order of their first files."""
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                key = f"{folder}{slash}{stem}"
                sample = samples.setdefault(key, _Sample(f"sample {key} of {path}"))
                if f".{ending.lower()}" in image_suffixes():
                    sample.images.append(TarMember(path, member.name, member.offset_data, member.size))
                elif ending in ("txt", "json", LABEL):
                    content = tar.extractfile(member)
                    assert content is not None
                    sample.texts[ending] = content.read()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar: {error}") from error
    return list(samples.values())


def _label(sample: _Sample) -> int | None:
    """Class from a sample's .cls file; None without such a file."""
    text = sample.texts.get(LABEL)
    if text is None:
        return None
    if not text.strip().isdigit():
        raise ValueError(f"{sample.name} has the class {text[:40]!r}; give a whole number, 0 or more")
    return int(text)


def _captions(sample: _Sample, column: str) -> tuple[str, ...]:
    try:
        if column == "txt":
            return (sample.texts["txt"].decode().strip(),)
        return as_captions(json.loads(sample.texts["json"])[column])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{sample.name} has no caption {column!r} ({error!r}); see data.caption_column") from error
