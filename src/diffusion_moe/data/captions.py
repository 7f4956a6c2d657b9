"""Features of a data set's captions: encoded in memory, or read from the files that `encode --captions` wrote.

An image may have several captions. The one that an epoch uses is a function of (seed, epoch, index).

Files in the folder of a latent cache:

- `captions.json`: the text encoder, the column, and a hash of the captions.
- `captions/00000.f16`: tokens of one caption after another, (tokens, width), float16, little endian.
- `captions/00000.pooled.f16`: pooled features, (captions, width), if the encoder has them.
- `captions/00000.json`: number of captions of each image, and of tokens of each caption.

Shard 00000 belongs to the latents' first shard; `captions/empty` is the empty prompt.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..randomness import uniform
from ..text import TextFeatures, TextSpace, load_encoder
from .float16_files import DTYPE, Float16Files

HEADER, FOLDER, EMPTY = "captions.json", "captions", "empty"
VERSION = 1
Captions = Callable[[int], Sequence[str]]
"""Captions of an image by its index."""


class CaptionFeatures(ABC):
    """Features of the captions of a data set's images."""

    space: TextSpace

    @abstractmethod
    def counts(self, indices: Tensor) -> Tensor:
        """Number of captions of each image, int64."""

    @abstractmethod
    def take(self, indices: Tensor, numbers: Tensor) -> TextFeatures:
        """Features of caption `numbers[i]` of image `indices[i]`, float16 or float32."""

    @abstractmethod
    def empty(self) -> TextFeatures:
        """Features of the empty prompt."""

    def sample(self, seed: int, indices: Tensor, epochs: Tensor) -> TextFeatures:
        """Features of one caption of each image, a function of (seed, epoch, index)."""
        numbers = uniform(seed, "caption", epochs, indices).double() * self.counts(indices)
        return self.take(indices, numbers.long())


class EncodedCaptions(CaptionFeatures):
    """Captions encoded on first use and kept in float16, for data sets whose features fit in memory.

    Args:
        config: names the encoder.
        captions: captions of each image.
        images: number of images.
    """

    def __init__(self, config: DataConfig, captions: Captions, images: int) -> None:
        assert config.text_encoder is not None
        self.captions = captions
        self.images = images
        self.encoder = load_encoder(config.text_encoder, config.text_length, config.text_precision)
        self.space = self.encoder.space()

    @cached_property
    def table(self) -> _CaptionTable:
        """Encoded captions of all images."""
        numbers = {"": 0}
        captions = [[numbers.setdefault(text, len(numbers)) for text in self.captions(i)] for i in range(self.images)]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        features = self.encoder.to(device).encode_all(list(numbers))
        del self.encoder  # so that loading processes get the features without it
        first = _starts([len(each) for each in captions])
        return _CaptionTable(
            [_half(text) for text in features], first, np.array([n for each in captions for n in each])
        )

    def counts(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(np.diff(self.table.first)[indices.numpy()])

    def take(self, indices: Tensor, numbers: Tensor) -> TextFeatures:
        table = self.table
        distinct = table.captions[table.first[indices.numpy()] + numbers.numpy()]
        return TextFeatures.together([table.features[number] for number in distinct.tolist()])

    def empty(self) -> TextFeatures:
        return self.table.features[0]


class _CaptionTable(NamedTuple):
    features: list[TextFeatures]
    """Features of each distinct caption, (1, L, W), float16; the first is the empty prompt."""
    first: np.ndarray
    """Index in `captions` of each image's first one, and of the end, int64."""
    captions: np.ndarray
    """Index in `features` of all captions of one image after another, int64."""


def _half(text: TextFeatures) -> TextFeatures:
    pooled = None if text.pooled is None else text.pooled.half()
    return text._replace(features=text.features.half(), pooled=pooled)


def _starts(counts: Sequence[int]) -> np.ndarray:
    """Sums of the counts before each, and of all, int64."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


class CaptionShard(NamedTuple):
    """Captions of one shard of latents."""

    first_caption: np.ndarray
    """First caption of each image, and the end, int64."""
    first_token: np.ndarray
    """First token of each caption, and the end, int64."""


class CachedCaptions(CaptionFeatures):
    """Caption features in a latent cache, read by memory map.

    Args:
        folder: the cache.
        selected: stored image of each index, int64.
        ends: stored images up to the end of each shard, int64.

    Attributes:
        sha256: a hash of the captions and the selected images.
    """

    def __init__(self, folder: Path, selected: np.ndarray, ends: np.ndarray) -> None:
        self.folder = folder
        self.selected = selected
        self.ends = ends
        self.files = Float16Files()
        try:
            header = json.loads((folder / HEADER).read_text())
            if header["version"] != VERSION:
                raise ValueError(f"its version is {header['version']}, and this library reads {VERSION}")
            self.space = TextSpace.from_dict(header["space"])
            self.sha256 = hashlib.sha256(str(header["captions_sha256"]).encode() + selected.tobytes()).hexdigest()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / HEADER} cannot be read ({error!r}); encode the captions again") from error
        self.shards: dict[str, CaptionShard] = {}
        for name in [EMPTY, *(f"{number:05d}" for number in range(len(ends)))]:
            shard = read_shard(folder, name, self.space)
            if shard is None:
                raise ValueError(
                    f"the captions of {folder} are not finished, or files are damaged; run the same `diffusion-moe "
                    "encode --captions` command again"
                )
            self.shards[name] = shard

    def counts(self, indices: Tensor) -> Tensor:
        captions = [self._captions(index) for index in indices.tolist()]
        return torch.tensor([end - first for _, first, end in captions])

    def take(self, indices: Tensor, numbers: Tensor) -> TextFeatures:
        texts = []
        for index, number in zip(indices.tolist(), numbers.tolist()):
            name, first, _ = self._captions(index)
            texts.append(self._read(name, first + number))
        return TextFeatures.together(texts)

    def empty(self) -> TextFeatures:
        return self._read(EMPTY, 0)

    def _captions(self, index: int) -> tuple[str, int, int]:
        """Shard of an image, its first caption there, and the end of its captions."""
        stored = int(self.selected[index])
        number = int(np.searchsorted(self.ends, stored, side="right"))
        name = f"{number:05d}"
        image = stored - (int(self.ends[number - 1]) if number else 0)
        first, end = self.shards[name].first_caption[image : image + 2]
        return name, int(first), int(end)

    def _read(self, name: str, caption: int) -> TextFeatures:
        first, end = self.shards[name].first_token[caption : caption + 2]
        files = feature_files(self.folder, name, self.space)
        features = torch.from_numpy(np.array(self.files(files[0], (self.space.width,))[first:end]))[None]
        pooled = None
        if self.space.pooled_width:
            pooled = torch.from_numpy(np.array(self.files(files[1], (self.space.pooled_width,))[caption]))[None]
        return TextFeatures(features, torch.ones(features.shape[:2], dtype=torch.bool), pooled)


def feature_files(folder: Path, name: str, space: TextSpace) -> list[Path]:
    """Files of a shard: token features, and pooled ones if there are any."""
    tokens = folder / FOLDER / f"{name}.f16"
    return [tokens, tokens.with_name(f"{name}.pooled.f16")] if space.pooled_width else [tokens]


def read_shard(folder: Path, name: str, space: TextSpace) -> CaptionShard | None:
    """Contents of a shard's files; None if a file is missing or has another length."""
    try:
        content = json.loads((folder / FOLDER / f"{name}.json").read_text())
        counts, lengths = content["counts"], content["lengths"]
        if sum(counts) != len(lengths) or min(counts, default=1) <= 0:
            return None
        sizes = [sum(lengths) * space.width, len(lengths) * space.pooled_width]
        for file, size in zip(feature_files(folder, name, space), sizes):
            if file.stat().st_size != size * DTYPE.itemsize:
                return None
        return CaptionShard(_starts(counts), _starts(lengths))
    except (OSError, KeyError, TypeError, ValueError):
        return None
