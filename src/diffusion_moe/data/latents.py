"""The latent cache: what a VAE makes of a data set, in raw float16 files that are read by memory map.

`latents.json` says what the files hold; `shards/00000.f16` and so on hold, for one image after another, views (as it
is, mirrored) x parts (mean and standard deviation of the posterior, or one sample of it) x channels x height x width,
little endian. `diffusion-moe encode` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..randomness import normal
from .captions import HEADER as CAPTIONS
from .captions import CachedCaptions
from .dataset import Batch, ImageDataset
from .latent_space import LatentScaling, LatentSpace
from .listing import hash_names
from .splits import Split, split_indices

HEADER = "latents.json"
SHARDS = "shards"
VERSION = 1
DTYPE = np.dtype("<f2")
HOW_TO_ENCODE = "make one with `diffusion-moe encode IMAGES --vae VAE --output CACHE`"
HOW_TO_GO_ON = "run the same `diffusion-moe encode` command again"


@dataclass(frozen=True)
class CachePlan:
    """What a cache holds, known before anything is encoded."""

    space: LatentSpace
    """The VAE, and the scaling that its config asks for."""
    data: dict[str, Any]
    """What the latents were made of; `path` and `vae` are notes, the hashes decide."""
    images: int
    """Images of the data set, unreadable ones too."""
    class_names: tuple[str, ...]
    image_size: int
    """Side of the images that were encoded, in pixels."""
    latent_shape: tuple[int, int, int]
    """Channels, height, width."""
    store: Literal["moments", "samples"]
    """moments: mean and standard deviation; samples: one draw."""
    flip: bool
    """Whether there is the mirrored image's latent beside each."""
    seed: int
    """Of the draws (store: samples)."""
    precision: str
    """What the VAE computed in."""
    shard_images: int
    """Shard i holds images i * shard_images onwards, but for the unreadable ones."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of what is stored of one image."""
        return (2 if self.flip else 1, 2 if self.store == "moments" else 1, *self.latent_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.row_shape)) * DTYPE.itemsize

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_images)

    def indices(self, shard: int) -> range:
        """Images of one shard."""
        return range(shard * self.shard_images, min(self.images, (shard + 1) * self.shard_images))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self) | {"class_names": list(self.class_names), "latent_shape": list(self.latent_shape)}
        return {"format": "diffusion-moe latents", "version": VERSION, **plain}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CachePlan:
        """From what `to_dict` gave; KeyError, TypeError or ValueError where that is damaged."""
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}, and this library reads {VERSION}")
        fields = {name: content[name] for name in cls.__dataclass_fields__}
        shape = tuple(int(side) for side in content["latent_shape"])
        plan = cls(
            **fields
            | {
                "space": LatentSpace.from_dict(content["space"]),
                "class_names": tuple(map(str, content["class_names"])),
                "latent_shape": shape,
            }
        )
        numbers = (*shape, plan.images, plan.shard_images, plan.image_size)
        if len(shape) != 3 or not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError("a size is not positive")
        if plan.store not in ("moments", "samples"):
            raise ValueError(f"store is {plan.store}")
        return plan


class Shard(NamedTuple):
    """One file of a finished cache."""

    images: int
    sha256: str


@dataclass(frozen=True)
class CacheHeader:
    """A finished cache."""

    plan: CachePlan
    labels: np.ndarray
    """Class of each stored image, int64."""
    skipped: tuple[tuple[int, str], ...]
    """Unreadable images, which are left out: place in the data set, and name."""
    channel_mean: tuple[float, ...]
    """Mean of each channel over all images, of draws from the posterior."""
    channel_std: tuple[float, ...]
    shards: tuple[Shard, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.plan.to_dict() | {
            "count": len(self.labels),
            "channel_mean": list(self.channel_mean),
            "channel_std": list(self.channel_std),
            "shards": [shard._asdict() for shard in self.shards],
            "skipped": [list(image) for image in self.skipped],
            "labels": self.labels.tolist(),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CacheHeader:
        """From what `to_dict` gave; KeyError, TypeError or ValueError where that is damaged."""
        header = cls(
            plan=CachePlan.from_dict(content),
            labels=np.array(content["labels"], dtype=np.int64),
            skipped=tuple((int(index), str(name)) for index, name in content["skipped"]),
            channel_mean=tuple(map(float, content["channel_mean"])),
            channel_std=tuple(map(float, content["channel_std"])),
            shards=tuple(Shard(int(shard["images"]), str(shard["sha256"])) for shard in content["shards"]),
        )
        counted = sum(shard.images for shard in header.shards)
        if not len(header.labels) == counted == content["count"] > 0:
            raise ValueError(f"it counts {content['count']} images, {len(header.labels)} labels, {counted} in shards")
        if header.labels.min() < 0 or header.labels.max() >= len(header.plan.class_names):
            raise ValueError("a label is out of range")
        if not len(header.channel_mean) == len(header.channel_std) == header.plan.latent_shape[0]:
            raise ValueError("its statistics have another number of channels")
        return header


def shard_path(folder: Path, shard: int) -> Path:
    """The file of one shard."""
    return folder / SHARDS / f"{shard:05d}.f16"


def read_plan(folder: Path) -> tuple[CachePlan, dict[str, Any]]:
    """What a cache is to hold, finished or not, and the whole content of its header.

    Raises:
        ValueError: there is no cache, or its header is damaged.
    """
    if not (folder / HEADER).is_file():
        raise ValueError(f"data.path {folder} holds no {HEADER}, so it is no latent cache; {HOW_TO_ENCODE}")
    try:
        content = json.loads((folder / HEADER).read_text())
        return CachePlan.from_dict(content), content
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / HEADER} cannot be read ({error!r}); encode anew") from error


def read_header(folder: Path) -> CacheHeader:
    """The header of a finished cache whose files are all there, in their full length.

    Raises:
        ValueError: it is not finished, damaged, or a file is missing.
    """
    _, content = read_plan(folder)
    if "shards" not in content:
        raise ValueError(f"the latent cache {folder} is not finished; {HOW_TO_GO_ON}")
    try:
        header = CacheHeader.from_dict(content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / HEADER} is damaged ({error!r}); encode anew") from error
    for number, shard in enumerate(header.shards):
        path = shard_path(folder, number)
        size, expected = path.stat().st_size if path.is_file() else 0, shard.images * header.plan.row_bytes
        if size != expected or not path.is_file():
            raise ValueError(f"{path} has {size} bytes, but should have {expected}; {HOW_TO_GO_ON}")
    return header


class LatentCache(ImageDataset):
    """Latents as a model sees them: scaled, float32.

    In training, which view is taken and the draw mean + std * noise are functions of (seed, epoch, index); `read` gives
    the mean (or the stored sample) of the image as it is.
    """

    shape_remedy = "encode with another --image_size or --vae, or set the model's"

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        if config.path is None:
            raise ValueError(f"data.path is missing; data.kind latents needs a latent cache: {HOW_TO_ENCODE}")
        self.folder = Path(config.path)
        self.header = read_header(self.folder)
        plan = self.plan = self.header.plan
        if config.flip and not plan.flip:
            raise ValueError(
                f"data.flip is true, but the latent cache {self.folder} holds no mirrored images; encode with "
                "--flip true, or set data.flip to false"
            )
        self.class_names = list(plan.class_names)
        self.rows = split_indices(self.header.labels, config.test_fraction, split)
        self.labels = self.header.labels[self.rows]
        if len(self.rows) == 0:
            raise ValueError(f"data.path {config.path} gives no image for the {split} split; see data.test_fraction")
        self.space = LatentSpace(plan.space.vae, plan.space.encoder_sha256, self._scaling(config.normalize))
        counts = [shard.images for shard in self.header.shards]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        if (self.folder / CAPTIONS).is_file():
            self.texts = CachedCaptions(self.folder, self.rows, self._ends)

    def _scaling(self, normalize: Literal["scaling", "channel"]) -> LatentScaling:
        if normalize == "scaling":
            return self.plan.space.scaling
        if 0.0 in self.header.channel_std:
            raise ValueError(
                f"data.normalize is channel, but a channel of the latent cache {self.folder} is constant; use scaling"
            )
        return LatentScaling(self.header.channel_mean, tuple(1 / std for std in self.header.channel_std))

    def read(self, indices: Sequence[int]) -> Batch:
        places = torch.as_tensor(list(indices), dtype=torch.long)
        stored = self._stored(places, torch.zeros_like(places, dtype=torch.bool))
        return Batch(self.space.scaling.scaled(stored[:, 0]), self._labels(places))

    def draw(self, indices: Tensor, epochs: Tensor) -> Batch:
        stored = self._stored(indices, self.mirrored(indices, epochs))
        latents = stored[:, 0]
        if self.plan.store == "moments":
            noise = normal(self.seed, "posterior", epochs, indices, self.plan.latent_shape)
            latents = latents + stored[:, 1] * noise
        return Batch(self.space.scaling.scaled(latents), self._labels(indices))

    def identity(self) -> str:
        """A hash of the stored latents and their classes."""
        return hash_names((shard.sha256 for shard in self.header.shards), self.header.labels)

    def record(self) -> dict[str, Any]:
        return super().record() | {"latent_space": self.space.to_dict()}

    def _labels(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(self.labels[indices.numpy()])

    def _stored(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """One view of each image, (B, parts, C, H, W), float32."""
        rows = self.rows[indices.numpy()]
        shards = np.searchsorted(self._ends, rows, side="right")
        views = zip(rows, shards, mirrored.long().tolist())
        stored = [self._maps[shard][row - self._starts[shard], view] for row, shard, view in views]
        return torch.from_numpy(np.stack(stored).astype(np.float32))

    @cached_property
    def _maps(self) -> _Maps:
        return _Maps(self.folder, self.header)

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the files itself; a pickled map would be a copy of them."""
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}


class _Maps(dict[int, np.ndarray]):
    """Memory maps by shard, (images, views, parts, C, H, W), opened when first asked for."""

    def __init__(self, folder: Path, header: CacheHeader) -> None:
        super().__init__()
        self.folder, self.header = folder, header

    def __missing__(self, shard: int) -> np.ndarray:
        shape = (self.header.shards[shard].images, *self.header.plan.row_shape)
        self[shard] = np.memmap(shard_path(self.folder, shard), dtype=DTYPE, mode="r", shape=shape)
        return self[shard]
