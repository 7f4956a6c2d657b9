"""From images to a latent cache (data/latents.py has the format).

Shard i always holds images i * shard_images onwards, and what is stored of an image depends on it alone. So the files
are the same for any number of processes, and a shard is either there, whole and with its hash, or encoded again.
Processes do not talk to each other: rank r takes every world-th shard, and who finds all shards done writes the header.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import DataConfig
from ..data import load_dataset
from ..data.latent_space import LatentScaling, LatentSpace, encoder_sha256
from ..data.latents import DTYPE, CachePlan
from ..data.table import TableImages
from ..log import Log
from ..randomness import normal
from ..sampling.loading import load_vae
from .captions import claim_captions, encode_captions, missing_captions
from .files import SKIPPED, ShardWriter, claim, finish, is_done, missing_shards
from .options import EncodeOptions
from .process import Process

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def encode(data: DataConfig, options: EncodeOptions, log: Log = print) -> str:
    """Write this process' shards of a cache, and its header if they are the last.

    Args:
        data: the images; `channels` is the VAE's, and all of them are encoded. log: receives lines of progress.

    Returns:
        One line for the user.

    Raises:
        ValueError: data or VAE cannot be used, the output is another's, an image cannot be read or stored.
    """
    process = Process.here()
    if data.kind not in ("folder", "huggingface", "webdataset"):
        raise ValueError(f"kind is {data.kind}; encode takes folder, huggingface or webdataset")
    data = dataclasses.replace(data, caption_column=options.captions)
    vae = load_vae(options.vae)
    if vae.config.in_channels not in (1, 3):
        raise ValueError(f"the VAE {options.vae} takes {vae.config.in_channels} channels; give one of images, 1 or 3")
    data = dataclasses.replace(data, channels=vae.config.in_channels, flip=False, test_fraction=0.0)
    dataset = load_dataset(data, "train")
    assert isinstance(dataset, TableImages)
    for line in dataset.notes if process.rank == 0 else ():
        log(line)
    plan, folder = make_plan(vae, dataset, options), options.output
    claim(folder, plan)
    encoder = claim_captions(dataset, options, log)
    mine = process.shards(plan)
    todo = [shard for shard in mine if not is_done(folder, plan, shard, options.verify)]
    if todo:
        size = f"{plan.images * plan.row_bytes / 1e9:.3g} GB"
        log(f"encoding {plan.images} images into {plan.shards} files, {size}; {len(todo)} files to do here")
        _encode_shards(_on_device(vae, options, process), dataset, plan, options, todo, log)
    if encoder is not None:
        encode_captions(encoder, dataset, plan, options, process, log)
        if missing := missing_captions(folder, plan, encoder.space()):
            return f"this process is done; {missing} of {plan.shards} files of captions are still to come from others"
    if missing := missing_shards(folder, plan):
        return f"this process is done; {missing} of {plan.shards} files are still to come from others"
    header = finish(folder, plan)
    left_out = f"; {len(header.skipped)} unreadable images are left out, {folder / SKIPPED} names them"
    return f"{folder} holds the latents of {len(header.labels)} images" + (left_out if header.skipped else "")


def make_plan(vae: AutoencoderKL, dataset: TableImages, options: EncodeOptions) -> CachePlan:
    """What the cache will hold.

    Raises:
        ValueError: the image size does not suit the VAE.
    """
    config, size = dataset.config, dataset.config.image_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % factor:
        raise ValueError(f"image_size is {size}, not divisible by {factor}, by which the VAE {options.vae} shrinks")
    note = {name: getattr(config, name) for name in ("kind", "split", "subset", "revision", "background")}
    return CachePlan(
        space=LatentSpace(_absolute(options.vae), encoder_sha256(vae), LatentScaling.of_vae(vae.config)),
        data={"path": _absolute(str(config.path)), "sha256": dataset.identity()} | note,
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
    """A path that is there, from the root; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _on_device(vae: AutoencoderKL, options: EncodeOptions, process: Process) -> AutoencoderKL:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but no CUDA device is available; set it to auto or cpu")
    if options.device == "cpu" or not torch.cuda.is_available():
        return vae
    return vae.to(torch.device("cuda", process.local_rank % torch.cuda.device_count()))


class Decoded(NamedTuple):
    """A batch of images, as far as they can be read."""

    images: Tensor
    """NCHW, float32, [-1, 1]."""
    indices: list[int]
    """Of `images` in the data set."""
    skipped: list[tuple[int, str]]
    """Place and name of each unreadable one."""


class _Images:
    """What the DataLoader fetches batches from."""

    def __init__(self, dataset: TableImages) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> Decoded:
        decoded = [(index, self.dataset.decode(index)) for index in indices]
        readable = [(index, image) for index, image in decoded if image is not None]
        skipped = [(index, self.dataset.name(index)) for index, image in decoded if image is None]
        images = torch.stack([image for _, image in readable]) if readable else torch.empty(0)
        return Decoded(images, [index for index, _ in readable], skipped)


def _as_fetched(batch: Decoded) -> Decoded:
    return batch


def _encode_shards(
    vae: AutoencoderKL, dataset: TableImages, plan: CachePlan, options: EncodeOptions, todo: list[int], log: Log
) -> None:
    # Batches end where shards do, so that they are the same whoever encodes a shard.
    batches = [
        (shard, list(plan.indices(shard)[start : start + options.batch_size]))
        for shard in todo
        for start in range(0, len(plan.indices(shard)), options.batch_size)
    ]
    loader: DataLoader = DataLoader(
        _Images(dataset),  # type: ignore[arg-type]  # it fetches whole batches
        batch_sampler=[indices for _, indices in batches],
        num_workers=dataset.config.num_workers,
        collate_fn=_as_fetched,  # type: ignore[arg-type]
    )
    total, done, spoke = sum(len(indices) for _, indices in batches), 0, time.monotonic()
    shards = (shard for shard, _ in batches)
    for shard, part in itertools.groupby(zip(shards, _in_one_line(loader)), key=lambda pair: pair[0]):
        with ShardWriter(options.output, plan, shard) as writer:
            for _, decoded in part:
                writer.skip(decoded.skipped)
                if decoded.indices:
                    latents = latents_of(vae, decoded, dataset, plan)
                    writer.add(latents, dataset.labels[decoded.indices].tolist())
                done += len(decoded.indices) + len(decoded.skipped)
                if time.monotonic() - spoke > 10 and done < total:
                    log(f"encoded {done} of {total} images")
                    spoke = time.monotonic()


def _in_one_line(loader: DataLoader) -> Iterator[Decoded]:
    try:
        yield from loader
    except ValueError as error:  # a worker process sends its traceback along; its last line is the message
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


@torch.no_grad()
def latents_of(vae: AutoencoderKL, decoded: Decoded, dataset: TableImages, plan: CachePlan) -> np.ndarray:
    """What is stored of a batch: (B, views, parts, C, H, W), float16.

    Raises:
        ValueError: a latent is not finite, or larger than float16 holds; the image is named.
    """
    images, views = decoded.images.to(vae.device), list[Tensor]()
    for view in [images, images.flip(-1)] if plan.flip else [images]:
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            posterior = vae.encode(view).latent_dist
        mean, std = posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()
        if plan.store == "samples":
            indices = torch.tensor(decoded.indices, device=vae.device)
            mean = mean + std * normal(plan.seed, "posterior", len(views), indices, plan.latent_shape)
        views.append(torch.stack((mean, std) if plan.store == "moments" else (mean,), dim=1))
    latents = torch.stack(views, dim=1).cpu()
    with np.errstate(over="ignore", invalid="ignore"):
        stored = latents.numpy().astype(DTYPE)
    if stored.shape[1:] != plan.row_shape:
        raise ValueError(f"the VAE gives latents of {stored.shape[3:]}, not of {plan.latent_shape}; take another VAE")
    spoilt = ~np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    if spoilt.any():
        place = int(spoilt.argmax())
        largest = float(latents[place].abs().max())
        raise ValueError(
            f"the latent of image {dataset.name(decoded.indices[place])} has a value of {largest:g}, but float16 holds "
            "finite ones up to 65504; remove the image, encode with --precision fp32, or take another VAE"
        )
    return stored
