"""Latent cache: the latents of a data set, written by `diffusion-moe encode` as raw float16 files.

`latents.json` is the header. `shards/00000.f16` and so on hold one image after another: views (plain, mirrored) x parts
(mean and standard deviation of the posterior, or one sample of it) x channels x height x width, little endian.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from .float16_files import DTYPE, Float16Files
from .image_table import Split, split_indices
from .latent_space import LatentScaling, LatentSpace
from .listing import hash_names

HEADER = "latents.json"
SHARDS = "shards"
VERSION = 1
HOW_TO_ENCODE = "make one with `diffusion-moe encode IMAGES --vae VAE --output CACHE`"
HOW_TO_RESUME = "run the same `diffusion-moe encode` command again"


@dataclass(frozen=True)
class CachePlan:
    """Contents of a cache as far as they are known before anything is encoded."""

    space: LatentSpace
    """The VAE, and the scaling from its config."""
    data: dict[str, Any]
    """Origin of the images: `path` and settings as notes, and `sha256`, which identifies them."""
    images: int
    """Images of the data set, unreadable ones too."""
    class_names: tuple[str, ...]
    image_size: int
    """Side of the encoded images, in pixels."""
    latent_shape: tuple[int, int, int]
    """Channels, height, width."""
    store: Literal["moments", "samples"]
    """moments: mean and standard deviation; samples: one sample."""
    flip: bool
    """True if the mirrored image's latent is stored too."""
    seed: int
    """Seed of the samples (store: samples)."""
    precision: str
    """Precision of the VAE."""
    shard_images: int
    """Images of a shard: shard i holds images i * shard_images onwards, without the unreadable ones."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of the stored values of one image: views, parts, channels, height, width."""
        return (2 if self.flip else 1, 2 if self.store == "moments" else 1, *self.latent_shape)

    @property
    def image_bytes(self) -> int:
        """Stored bytes of one image."""
        return int(np.prod(self.image_shape)) * DTYPE.itemsize

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_images)

    def indices(self, shard: int) -> range:
        """Images of one shard."""
        return range(shard * self.shard_images, min(self.images, (shard + 1) * self.shard_images))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": "diffusion-moe latents", "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CachePlan:
        """The plan from `to_dict`; KeyError, TypeError or ValueError if it is damaged."""
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}, and this library reads {VERSION}")
        fields = {name: content[name] for name in cls.__dataclass_fields__}
        fields["space"] = LatentSpace.from_dict(content["space"])
        fields["class_names"] = tuple(map(str, content["class_names"]))
        fields["latent_shape"] = tuple(map(int, content["latent_shape"]))
        plan = cls(**fields)
        sizes = (*plan.latent_shape, plan.images, plan.shard_images, plan.image_size)
        if len(plan.latent_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("a size is not positive")
        if plan.store not in ("moments", "samples"):
            raise ValueError(f"store is {plan.store}")
        return plan


class LatentShard(NamedTuple):
    """One file of a finished cache."""

    images: int
    sha256: str


@dataclass(frozen=True)
class CacheHeader:
    """Header of a finished cache."""

    plan: CachePlan
    labels: np.ndarray
    """Class of each stored image, int64."""
    skipped: tuple[tuple[int, str], ...]
    """Unreadable images, which are left out: index in the data set, and name."""
    channel_mean: tuple[float, ...]
    """Mean of each channel over all images, of samples from the posterior."""
    channel_std: tuple[float, ...]
    shards: tuple[LatentShard, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.plan.to_dict() | {
            "count": len(self.labels),
            "channel_mean": self.channel_mean,
            "channel_std": self.channel_std,
            "shards": [shard._asdict() for shard in self.shards],
            "skipped": self.skipped,
            "labels": self.labels.tolist(),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CacheHeader:
        """The header from `to_dict`; KeyError, TypeError or ValueError if it is damaged."""
        header = cls(
            plan=CachePlan.from_dict(content),
            labels=np.array(content["labels"], dtype=np.int64),
            skipped=tuple((int(index), str(name)) for index, name in content["skipped"]),
            channel_mean=tuple(map(float, content["channel_mean"])),
            channel_std=tuple(map(float, content["channel_std"])),
            shards=tuple(LatentShard(int(shard["images"]), str(shard["sha256"])) for shard in content["shards"]),
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
    """File of one shard."""
    return folder / SHARDS / f"{shard:05d}.f16"


def read_plan(folder: Path) -> tuple[CachePlan, dict[str, Any]]:
    """Plan of a cache, finished or not, and the whole content of its header.

    Raises:
        ValueError: there is no cache, or its header is damaged.
    """
    header = folder / HEADER
    if not header.is_file():
        raise ValueError(f"data.path {folder} holds no {HEADER}, so it is no latent cache; {HOW_TO_ENCODE}")
    try:
        content = json.loads(header.read_text())
        return CachePlan.from_dict(content), content
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{header} cannot be read ({error!r}); encode again") from error


def read_header(folder: Path) -> CacheHeader:
    """Header of a finished cache, after a check that all files have their full length.

    Raises:
        ValueError: the cache is not finished or damaged, or a file is missing.
    """
    _, content = read_plan(folder)
    if "shards" not in content:
        raise ValueError(f"the latent cache {folder} is not finished; {HOW_TO_RESUME}")
    try:
        header = CacheHeader.from_dict(content)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / HEADER} is damaged ({error!r}); encode again") from error
    for number, shard in enumerate(header.shards):
        path = shard_path(folder, number)
        size = path.stat().st_size if path.is_file() else 0
        expected = shard.images * header.plan.image_bytes
        if size != expected or not path.is_file():
            raise ValueError(f"{path} has {size} bytes, but should have {expected}; {HOW_TO_RESUME}")
    return header


class LatentCache(ImageDataset):
    """Scaled latents as the model sees them, float32.

    Training mirrors images and samples mean + std * noise by (seed, epoch, index); `read` gives the mean (or the stored
    sample) of the plain image.
    """

    shape_remedy = "encode with another --image_size or --vae, or set the model's"

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        if config.path is None:
            raise ValueError(f"data.path is missing; data.kind latents needs a latent cache: {HOW_TO_ENCODE}")
        self.folder = Path(config.path)
        self.header = read_header(self.folder)
        self.plan = self.header.plan
        self.files = Float16Files()
        if config.flip and not self.plan.flip:
            raise ValueError(
                f"data.flip is true, but the latent cache {self.folder} holds no mirrored images; encode with "
                "--flip true, or set data.flip to false"
            )
        self.class_names = list(self.plan.class_names)
        self.selected = split_indices(self.header.labels, config.test_fraction, split)
        """Stored image of each index."""
        self.labels = self.header.labels[self.selected]
        self.space = replace(self.plan.space, scaling=self._scaling(config.normalize))
        self._ends = np.cumsum([shard.images for shard in self.header.shards])
        if (self.folder / CAPTIONS).is_file():
            self.texts = CachedCaptions(self.folder, self.selected, self._ends)

    def _scaling(self, normalize: Literal["scaling", "channel"]) -> LatentScaling:
        if normalize == "scaling":
            return self.plan.space.scaling
        if 0.0 in self.header.channel_std:
            raise ValueError(
                f"data.normalize is channel, but a channel of the latent cache {self.folder} is constant; use scaling"
            )
        return LatentScaling(self.header.channel_mean, tuple(1 / std for std in self.header.channel_std))

    def read(self, indices: Sequence[int]) -> Batch:
        requested = torch.as_tensor(list(indices), dtype=torch.long)
        stored = self._stored(requested, torch.zeros_like(requested, dtype=torch.bool))
        return self._batch(stored[:, 0], requested)

    def read_augmented(self, indices: Tensor, epochs: Tensor) -> Batch:
        stored = self._stored(indices, self.mirrored(indices, epochs))
        latents = stored[:, 0]
        if self.plan.store == "moments":
            noise = normal(self.seed, "posterior", epochs, indices, self.plan.latent_shape)
            latents = latents + stored[:, 1] * noise
        return self._batch(latents, indices)

    def identity(self) -> str:
        """A hash of the stored latents and their classes."""
        return hash_names((shard.sha256 for shard in self.header.shards), self.header.labels)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"latent_space": asdict(self.space)}

    def _batch(self, latents: Tensor, indices: Tensor) -> Batch:
        return Batch(self.space.scaling.scaled(latents), torch.from_numpy(self.labels[indices.numpy()]))

    def _stored(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """One view of each image, (B, parts, C, H, W), float32."""
        images = self.selected[indices.numpy()]
        shards = np.searchsorted(self._ends, images, side="right")
        stored = []
        for image, shard, view in zip(images, shards.tolist(), mirrored.long().tolist()):
            content = self.files(shard_path(self.folder, shard), self.plan.image_shape)
            stored.append(content[image - self._ends[shard], view])  # negative: counted from the shard's end
        return torch.from_numpy(np.stack(stored).astype(np.float32))
