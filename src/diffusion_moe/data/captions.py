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


class CaptionFeatures(ABC):
    """Features of the captions of a data set's images."""

    space: TextSpace

    @abstractmethod
    def take(self, indices: Tensor, shares: Tensor) -> TextFeatures:
        """Features of one caption of each image, float16 or float32.

        Args:
            indices: the images, int64, (B,).
            shares: position of each caption among its image's, [0, 1); 0 is the first.
        """

    @abstractmethod
    def empty(self) -> TextFeatures:
        """Features of the empty prompt."""

    def sample(self, seed: int, indices: Tensor, epochs: Tensor) -> TextFeatures:
        """Features of one caption of each image, a function of (seed, epoch, index)."""
        return self.take(indices, uniform(seed, "caption", epochs, indices))


class EncodedCaptions(CaptionFeatures):
    """Captions encoded on first use and kept in float16, for data sets whose features fit in memory.

    Args:
        config: names the encoder.
        captions: captions of an image by its index.
        images: number of images.
    """

    def __init__(self, config: DataConfig, captions: Callable[[int], Sequence[str]], images: int) -> None:
        assert config.text_encoder is not None
        self.captions = captions
        self.images = images
        self.encoder = load_encoder(config.text_encoder, config.text_length, config.text_precision)
        self.space = self.encoder.space()

    @cached_property
    def encoded(self) -> _Encoded:
        """Encoded captions of all images."""
        numbers = {"": 0}
        captions = [[numbers.setdefault(text, len(numbers)) for text in self.captions(i)] for i in range(self.images)]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        features = self.encoder.to(device).encode_all(list(numbers))
        del self.encoder  # so that loading processes get the features without it
        return _Encoded(captions, [text.cast(torch.float16) for text in features])

    def take(self, indices: Tensor, shares: Tensor) -> TextFeatures:
        found = []
        for index, share in zip(indices.tolist(), shares.tolist()):
            captions = self.encoded.captions[index]
            found.append(self.encoded.features[captions[int(share * len(captions))]])
        return TextFeatures.together(found)

    def empty(self) -> TextFeatures:
        return self.encoded.features[0]


class _Encoded(NamedTuple):
    captions: list[list[int]]
    """Index in `features` of each image's captions."""
    features: list[TextFeatures]
    """Features of each distinct caption, (1, L, W), float16; the first is the empty prompt."""


class CaptionShard(NamedTuple):
    """Captions of one shard of latents."""

    counts: list[int]
    """Captions of each image."""
    lengths: list[int]
    """Tokens of each caption."""


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
        self.token_ends: dict[str, np.ndarray] = {}
        counts = []
        for name in [EMPTY, *(f"{number:05d}" for number in range(len(ends)))]:
            shard = read_shard(folder, name, self.space)
            if shard is None:
                raise ValueError(
                    f"the captions of {folder} are not finished, or files are damaged; run the same `diffusion-moe "
                    "encode --captions` command again"
                )
            self.token_ends[name] = np.cumsum(shard.lengths)
            counts.append(np.array(shard.counts, dtype=np.int64))
        # Number of each image's captions, and their end in the image's shard.
        self.caption_counts = np.concatenate(counts[1:])
        self.caption_ends = np.concatenate([np.cumsum(each) for each in counts[1:]])

    def take(self, indices: Tensor, shares: Tensor) -> TextFeatures:
        images = self.selected[indices.numpy()]
        counts = self.caption_counts[images]
        captions = self.caption_ends[images] - counts + (shares.double().numpy() * counts).astype(np.int64)
        shards = np.searchsorted(self.ends, images, side="right")
        return TextFeatures.together([self._read(f"{shard:05d}", i) for shard, i in zip(shards, captions.tolist())])

    def empty(self) -> TextFeatures:
        return self._read(EMPTY, 0)

    def _read(self, name: str, caption: int) -> TextFeatures:
        """Features of one caption of a shard, (1, L, W)."""
        files, ends = feature_files(self.folder, name, self.space), self.token_ends[name]
        first = ends[caption - 1] if caption else 0
        tokens = torch.from_numpy(np.array(self.files(files[0], (self.space.width,))[first : ends[caption]]))
        pooled = None
        if self.space.pooled_width:
            pooled = torch.from_numpy(np.array(self.files(files[1], (self.space.pooled_width,))[[caption]]))
        return TextFeatures.padded([tokens], pooled)


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
        return CaptionShard(counts, lengths)
    except (OSError, KeyError, TypeError, ValueError):
        return None
