"""Encoding images into a latent cache (data/latents.py has the format).

Shard i always holds images i * shard_images onwards, and the latent of an image depends on that image alone. So the
files are the same for any number of processes, and a shard is either whole with its hash, or encoded again. Processes
do not communicate: rank r takes every world-th shard, and the one that finds all shards done writes the header.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import require
from ..config.data import IMAGE_FILES, DataConfig
from ..data import load_dataset
from ..data.dataset import load_batches
from ..data.float16_files import DTYPE
from ..data.image_files import ImageFileDataset
from ..data.latent_space import LatentScaling, LatentSpace, encoder_sha256
from ..data.latents import CachePlan
from ..distributed import to_device
from ..log import Log
from ..randomness import normal
from ..sampling.loading import load_vae
from .captions import claim_captions, encode_captions, missing_captions
from .files import SKIPPED, EncodedBatch, Process, claim, finish, is_done, missing_shards, write_shard
from .options import EncodeOptions

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LOG_SECONDS = 10
"""Least time between two lines of progress."""


def encode(data: DataConfig, options: EncodeOptions, log: Log = print) -> str:
    """Write this process' shards of a cache, and its header after the last one.

    Args:
        data: the images, all of which are encoded; `channels` is set to the VAE's.
        options: VAE, output and contents of the cache.
        log: receives lines of progress.

    Returns:
        One line for the user.

    Raises:
        ValueError: data or VAE cannot be used, the output is another cache, an image cannot be read or stored.
    """
    process = Process.here()
    require(data.kind in IMAGE_FILES, f"kind is {data.kind}; encode takes folder, huggingface or webdataset")
    vae = load_vae(options.vae)
    channels = vae.config.in_channels
    require(channels in (1, 3), f"the VAE {options.vae} takes {channels} channels; give one of images, 1 or 3")
    data = dataclasses.replace(data, caption_column=options.captions, channels=channels, flip=False, test_fraction=0.0)
    dataset = load_dataset(data, "train")
    assert isinstance(dataset, ImageFileDataset)
    if process.rank == 0:
        for line in dataset.notes:
            log(line)
    plan, folder = make_plan(vae, dataset, options), options.output
    claim(folder, plan)
    encoder = claim_captions(dataset, options, log)
    todo = [shard for shard in process.shards(plan) if not is_done(folder, plan, shard, options.verify)]
    if todo:
        size = f"{plan.images * plan.image_bytes / 1e9:.3g} GB"
        log(f"encoding {plan.images} images into {plan.shards} files, {size}; {len(todo)} files to do here")
        _encode_shards(vae.to(process.device(options.device)), dataset, plan, options, todo, log)
    if encoder is not None:
        encode_captions(encoder, dataset, plan, options, process, log)
        missing = missing_captions(folder, plan, encoder.space())
        if missing:
            return f"this process is done; {missing} of {plan.shards} files of captions are still to come from others"
    missing = missing_shards(folder, plan)
    if missing:
        return f"this process is done; {missing} of {plan.shards} files are still to come from others"
    header = finish(folder, plan)
    line = f"{folder} holds the latents of {len(header.labels)} images"
    if header.skipped:
        line += f"; {len(header.skipped)} unreadable images are left out, {folder / SKIPPED} names them"
    return line


def make_plan(vae: AutoencoderKL, dataset: ImageFileDataset, options: EncodeOptions) -> CachePlan:
    """Plan of the cache.

    Raises:
        ValueError: the VAE cannot divide the image size.
    """
    config, size = dataset.config, dataset.config.image_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % factor:
        raise ValueError(f"image_size is {size}, not divisible by {factor}, by which the VAE {options.vae} shrinks")
    notes = {name: getattr(config, name) for name in ("kind", "split", "subset", "revision", "background")}
    return CachePlan(
        space=LatentSpace(_absolute(options.vae), encoder_sha256(vae), LatentScaling.of_vae(vae.config)),
        data={"path": _absolute(str(config.path)), "sha256": dataset.identity()} | notes,
        images=len(dataset),
        class_names=tuple(dataset.class_names),
        image_size=size,
        latent_shape=(vae.config.latent_channels, size // factor, size // factor),
        store=options.store,
        flip=options.flip,
        seed=options.seed if options.store == "samples" else 0,
        precision=options.precision,
        shard_images=options.shard_images,
    )


def _absolute(name: str) -> str:
    """Absolute form of an existing path; a hub id unchanged."""
    return str(Path(name).resolve()) if Path(name).exists() else name


class DecodedBatch(NamedTuple):
    """The readable images of a batch, and the others' names."""

    images: Tensor
    """NCHW, float32, [-1, 1]."""
    indices: list[int]
    """Index of each image in the data set."""
    skipped: list[tuple[int, str]]
    """Index and name of each unreadable image."""


class _Decoder:
    """Data set for torch's DataLoader that fetches a batch at once."""

    def __init__(self, dataset: ImageFileDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> DecodedBatch:
        images, readable, skipped = [], [], []
        for index in indices:
            image = self.dataset.decode(index)
            if image is None:
                skipped.append((index, self.dataset.name(index)))
            else:
                images.append(image)
                readable.append(index)
        return DecodedBatch(torch.stack(images) if images else torch.empty(0), readable, skipped)


def _encode_shards(
    vae: AutoencoderKL, dataset: ImageFileDataset, plan: CachePlan, options: EncodeOptions, todo: list[int], log: Log
) -> None:
    # Batches end where shards do, so that they are the same for any distribution of the shards.
    size = options.batch_size
    batches = {
        shard: [indices[start : start + size] for start in range(0, len(indices), size)]
        for shard, indices in ((shard, plan.indices(shard)) for shard in todo)
    }
    total = sum(len(plan.indices(shard)) for shard in todo)
    done, logged = 0, time.monotonic()

    def encoded(batch: DecodedBatch) -> EncodedBatch:
        nonlocal done, logged
        done += len(batch.indices) + len(batch.skipped)
        if time.monotonic() - logged > LOG_SECONDS:
            log(f"encoding image {done} of {total}")
            logged = time.monotonic()
        latents = latents_of(vae, batch, dataset, plan) if batch.indices else np.zeros((0, *plan.image_shape), DTYPE)
        return EncodedBatch(latents, dataset.labels[batch.indices].tolist(), batch.skipped)

    loaded = load_batches(_Decoder(dataset), itertools.chain(*batches.values()), dataset.config.num_workers)
    for shard, parts in batches.items():
        write_shard(options.output, plan, shard, map(encoded, itertools.islice(loaded, len(parts))))


@torch.no_grad()
def latents_of(vae: AutoencoderKL, batch: DecodedBatch, dataset: ImageFileDataset, plan: CachePlan) -> np.ndarray:
    """Values to store of a batch: (B, views, parts, C, H, W), float16.

    Raises:
        ValueError: a latent is not finite, or larger than float16 holds; the message names the image.
    """
    images = to_device(batch.images, vae.device)
    views: list[Tensor] = []
    for view in [images, images.flip(-1)] if plan.flip else [images]:
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            posterior = vae.encode(view).latent_dist
        mean, std = posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()
        if plan.store == "samples":
            indices = torch.tensor(batch.indices, device=vae.device)
            mean = mean + std * normal(plan.seed, "posterior", len(views), indices, plan.latent_shape)
        views.append(torch.stack((mean, std) if plan.store == "moments" else (mean,), dim=1))
    latents = torch.stack(views, dim=1).cpu()
    with np.errstate(over="ignore", invalid="ignore"):
        stored = latents.numpy().astype(DTYPE)
    if stored.shape[1:] != plan.image_shape:
        raise ValueError(f"the VAE gives latents of {stored.shape[3:]}, not of {plan.latent_shape}; take another VAE")
    damaged = ~np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if damaged.any():
        i = int(damaged.argmax())
        largest = float(latents[i].abs().max())
        raise ValueError(
            f"the latent of image {dataset.name(batch.indices[i])} has a value of {largest:g}, but "
            "float16 holds finite ones up to 65504; remove the image, encode with --precision fp32, or take another VAE"
        )
    return stored
