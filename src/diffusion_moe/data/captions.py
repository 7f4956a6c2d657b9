"""Features of a data set's captions: encoded once in memory, or read from the files that `encode --captions` wrote.

An image may have several captions. Which one an epoch draws is a function of (seed, epoch, image).

A cache lies beside the latents: `captions.json` says whose features they are; `captions/00000.f16` and so on hold the
tokens of one caption after another, (tokens, width), float16, little endian; `captions/00000.pooled.f16` the pooled
features, (captions, width), if there are any; `captions/00000.json` how many captions each image has, and how many
tokens each caption. Number 00000 belongs to the latents' first shard; `captions/empty` is the empty prompt.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..randomness import uniform
from ..text import TextFeatures, TextSpace, load_encoder

HEADER, FOLDER, EMPTY = "captions.json", "captions", "empty"
VERSION = 1
DTYPE = np.dtype("<f2")
Captions = Callable[[int], Sequence[str]]
"""The captions of an image."""


class CaptionFeatures(ABC):
    """Features of the captions of a data set's images."""

    space: TextSpace

    @abstractmethod
    def counts(self, indices: Tensor) -> Tensor:
        """How many captions each image has, int64."""

    @abstractmethod
    def take(self, indices: Tensor, numbers: Tensor) -> TextFeatures:
        """Features of caption `numbers[i]` of image `indices[i]`, float16 or float32."""

    @abstractmethod
    def empty(self) -> TextFeatures:
        """The empty prompt's."""

    def draw(self, seed: int, indices: Tensor, epochs: Tensor) -> TextFeatures:
        """A caption of each image, by (seed, epoch, image)."""
        numbers = uniform(seed, "caption", epochs, indices).double() * self.counts(indices)
        return self.take(indices, numbers.long())


class EncodedCaptions(CaptionFeatures):
    """Every caption encoded once, when first asked for, and kept in float16; for sets whose features fit in memory.

    Args:
        captions: of each image. images: how many there are.
    """

    def __init__(self, config: DataConfig, captions: Captions, images: int) -> None:
        assert config.text_encoder is not None
        self.config, self.captions, self.images = config, captions, images
        self.encoder = load_encoder(config.text_encoder, config.text_length, config.text_precision)
        self.space = self.encoder.space()

    @cached_property
    def table(self) -> _Table:
        """Features of each distinct caption, float16, and which captions an image has."""
        numbers: dict[str, int] = {"": 0}
        rows = [[numbers.setdefault(text, len(numbers)) for text in self.captions(i)] for i in range(self.images)]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        features = self.encoder.to(device).encode_all(list(numbers))
        del self.encoder  # loading processes get what it said, not itself
        first = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
        return _Table([_narrow(text) for text in features], first, np.array([n for row in rows for n in row]))

    def counts(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(np.diff(self.table.first)[indices.numpy()])

    def take(self, indices: Tensor, numbers: Tensor) -> TextFeatures:
        table = self.table
        places = table.captions[table.first[indices.numpy()] + numbers.numpy()]
        return TextFeatures.together([table.features[place] for place in places.tolist()])

    def empty(self) -> TextFeatures:
        return self.table.features[0]


class _Table(NamedTuple):
    """Encoded captions of all images."""

    features: list[TextFeatures]
    """Of each distinct caption, (1, L, W); the first is the empty prompt."""
    first: np.ndarray
    """Of each image, its first place in `captions`, and one past the last, int64."""
    captions: np.ndarray
    """Of one image after another, places in `features`, int64."""


def _narrow(text: TextFeatures) -> TextFeatures:
    pooled = None if text.pooled is None else text.pooled.half()
    return text._replace(features=text.features.half(), pooled=pooled)


class CaptionShard(NamedTuple):
    """One shard's captions."""

    first_caption: np.ndarray
    """Of each image, and one past the last, int64."""
    first_token: np.ndarray
    """Of each caption, and one past the last, int64."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> CaptionShard:
        """From a shard's record."""
        starts = [np.concatenate(([0], np.cumsum(record[name], dtype=np.int64))) for name in ("counts", "lengths")]
        return cls(*starts)


class CachedCaptions(CaptionFeatures):
    """Features beside a latent cache, by memory map.

    Args:
        rows: the stored image of each index. ends: of each shard, the stored images up to its end.

    Attributes:
        sha256: a hash of the captions and of which images they belong to.
    """

    def __init__(self, folder: Path, rows: np.ndarray, ends: np.ndarray) -> None:
        self.folder, self.rows, self.ends = folder, rows, ends
        try:
            header = json.loads((folder / HEADER).read_text())
            if header["version"] != VERSION:
                raise ValueError(f"its version is {header['version']}, and this library reads {VERSION}")
            self.space = TextSpace.from_dict(header["space"])
            self.sha256 = hashlib.sha256(str(header["captions_sha256"]).encode() + rows.tobytes()).hexdigest()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / HEADER} cannot be read ({error!r}); encode the captions anew") from error
        records = [read_record(folder, f"{shard:05d}", self.space) for shard in range(len(ends))]
        missing = [shard for shard, record in enumerate(records) if record is None]
        if missing or read_record(folder, EMPTY, self.space) is None:
            raise ValueError(
                f"the captions of {folder} are not finished, or files are damaged; run the same `diffusion-moe encode "
                "--captions` command again"
            )
        self.shards = [CaptionShard.of(record) for record in records if record is not None]

    def counts(self, indices: Tensor) -> Tensor:
        pairs = [self._place(index) for index in indices.tolist()]
        starts = [self.shards[shard].first_caption[row : row + 2] for shard, row in pairs]
        return torch.tensor([int(end - first) for first, end in starts])

    def take(self, indices: Tensor, numbers: Tensor) -> TextFeatures:
        texts = []
        for index, number in zip(indices.tolist(), numbers.tolist()):
            shard, row = self._place(index)
            texts.append(self._read(f"{shard:05d}", int(self.shards[shard].first_caption[row]) + number))
        return TextFeatures.together(texts)

    def empty(self) -> TextFeatures:
        return self._read(EMPTY, 0)

    def _place(self, index: int) -> tuple[int, int]:
        row = int(self.rows[index])
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return shard, row - (int(self.ends[shard - 1]) if shard else 0)

    def _read(self, name: str, caption: int) -> TextFeatures:
        tokens, pooled = self._maps[name]
        starts = CaptionShard.of(read_record(self.folder, EMPTY, self.space) or {}) if name == EMPTY else None
        first, end = (starts or self.shards[int(name)]).first_token[caption : caption + 2]
        features = torch.from_numpy(np.array(tokens[first:end]))[None]
        mask = torch.ones(1, int(end - first), dtype=torch.bool)
        return TextFeatures(features, mask, None if pooled is None else torch.from_numpy(pooled[caption : caption + 1]))

    @cached_property
    def _maps(self) -> _Maps:
        return _Maps(self.folder, self.space)

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}


class _Maps(dict[str, tuple[np.ndarray, np.ndarray | None]]):
    """Token and pooled features by shard, opened when first asked for."""

    def __init__(self, folder: Path, space: TextSpace) -> None:
        super().__init__()
        self.folder, self.space = folder, space

    def __missing__(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        files = feature_files(self.folder, name, self.space)
        tokens = np.memmap(files[0], dtype=DTYPE, mode="r").reshape(-1, self.space.width)
        pooled = None
        if self.space.pooled_width:  # copied: they are few
            pooled = np.fromfile(files[1], dtype=DTYPE).reshape(-1, self.space.pooled_width)
        self[name] = tokens, pooled
        return self[name]


def feature_files(folder: Path, name: str, space: TextSpace) -> list[Path]:
    """The files of a shard."""
    tokens = folder / FOLDER / f"{name}.f16"
    return [tokens, tokens.with_name(f"{name}.pooled.f16")] if space.pooled_width else [tokens]


def read_record(folder: Path, name: str, space: TextSpace) -> dict[str, Any] | None:
    """What a shard's files hold, if they are there in their full length."""
    try:
        record = json.loads((folder / FOLDER / f"{name}.json").read_text())
        counts, lengths = record["counts"], record["lengths"]
        sizes = [sum(lengths) * space.width, len(lengths) * space.pooled_width]
        files = feature_files(folder, name, space)
        whole = all(file.stat().st_size == size * DTYPE.itemsize for file, size in zip(files, sizes))
        return record if whole and sum(counts) == len(lengths) and min(counts, default=1) > 0 else None
    except (OSError, KeyError, TypeError, ValueError):
        return None
