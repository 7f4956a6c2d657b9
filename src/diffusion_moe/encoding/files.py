"""Writing a latent cache: whole shards, each with a record of its contents, and the header after the last shard.

Several processes, also on several machines, may write to one folder: a file's content does not depend on its writer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..data.latents import HEADER, SHARDS, CacheHeader, CachePlan, LatentShard, read_plan, shard_path
from ..distributed import choose_device
from ..run_folder import replace_atomically, write_atomically

SKIPPED = "skipped.txt"
"""File of the cache with the names of unreadable images, a line each."""


class Process(NamedTuple):
    """One of the processes that encode, by torchrun's variables."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def here(cls) -> Process:
        """This process, from RANK, WORLD_SIZE and LOCAL_RANK.

        Raises:
            ValueError: a variable is not a number, or the rank is too large.
        """
        numbers = []
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            text = os.environ.get(name, default)
            if not text.isdecimal():
                raise ValueError(f"the variable {name} is {text!r}; expected a number, as torchrun sets it")
            numbers.append(int(text))
        process = cls(*numbers)
        if process.rank >= process.world:
            raise ValueError(f"the variable RANK is {process.rank}; expected less than WORLD_SIZE {process.world}")
        return process

    def shards(self, plan: CachePlan) -> range:
        """Shards of a cache that this process encodes."""
        return range(self.rank, plan.shards, self.world)

    def device(self, name: Literal["auto", "cpu", "cuda"]) -> torch.device:
        """This process' device for an option; each process gets a GPU of its own."""
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        return choose_device(name)


class EncodedBatch(NamedTuple):
    """Latents to store, and the images that could not be read."""

    latents: np.ndarray
    """(B, views, parts, C, H, W), float16."""
    labels: list[int]
    skipped: list[tuple[int, str]]
    """Index and name of each unreadable image."""


def claim(folder: Path, plan: CachePlan) -> None:
    """Begin a cache, or check that the folder holds a part of the same one.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; choose another folder")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    if HEADER not in names:
        if names:
            raise ValueError(f"output {folder} holds files but no {HEADER}, so it is no latent cache; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / HEADER, plan.to_dict())
    (folder / SHARDS).mkdir(exist_ok=True)
    changes = differences(_identity(read_plan(folder)[0]), _identity(plan))
    if changes:
        raise ValueError(f"output {folder} is another cache ({changes}); choose another folder")


def _identity(plan: CachePlan) -> dict[str, Any]:
    """The plan without the paths of VAE and data, which may differ between equal caches."""
    content = json.loads(json.dumps(plan.to_dict()))
    data, space = content.pop("data"), content.pop("space")
    # Caches written before transparency was laid over a background hold other pixels, and name no background.
    data = {"data": data["sha256"], "background": data.get("background")}
    return content | data | {"vae": space["encoder_sha256"], "scaling": space["scaling"]}


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Changed fields with both values, shortened, in one line; empty if there are none."""

    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 40 else f"{text[:40]}..."

    changed = [name for name in new if old.get(name) != new[name]]
    return "; ".join(f"{name}: {short(old.get(name))} -> {short(new[name])}" for name in changed)


def write_shard(folder: Path, plan: CachePlan, shard: int, batches: Iterable[EncodedBatch]) -> None:
    """Write one shard under a partial name, rename it, and write its record."""
    path = shard_path(folder, shard)
    record_path(folder, shard).unlink(missing_ok=True)
    digest = hashlib.sha256()
    labels: list[int] = []
    skipped: list[tuple[int, str]] = []
    # Sums of x and of x^2 over images, views, height and width, a channel each; x is sampled from the posterior.
    moments = np.zeros((2, plan.latent_shape[0]))
    with replace_atomically(path) as file:
        for batch in batches:
            content = batch.latents.tobytes()
            file.write(content)
            digest.update(content)
            labels += batch.labels
            skipped += batch.skipped
            # E[x] is the mean of the means, E[x^2] that of mean^2 + std^2; of a stored sample, those of x itself.
            parts = batch.latents.astype(np.float64)
            moments += np.stack([parts[:, :, 0].sum((0, 1, 3, 4)), (parts**2).sum((0, 1, 2, 4, 5))])
    record = {"images": len(labels), "sha256": digest.hexdigest(), "labels": labels, "skipped": skipped}
    write_json(record_path(folder, shard), record | {"moments": moments.tolist()})


def record_path(folder: Path, shard: int) -> Path:
    """File with a shard's hash, labels and statistics, for the header."""
    return shard_path(folder, shard).with_suffix(".json")


def is_done(folder: Path, plan: CachePlan, shard: int, verify: bool) -> bool:
    """True if a shard has its full length, and with `verify` its hash."""
    path = shard_path(folder, shard)
    try:
        record = json.loads(record_path(folder, shard).read_text())
        whole = path.stat().st_size == record["images"] * plan.image_bytes
        if not whole or not verify:
            return whole
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def missing_shards(folder: Path, plan: CachePlan) -> int:
    """Number of shards that are not written yet."""
    return sum(not is_done(folder, plan, shard, verify=False) for shard in range(plan.shards))


def finish(folder: Path, plan: CachePlan) -> CacheHeader:
    """Write the header of a cache that has all its shards.

    Raises:
        ValueError: not a single image could be read.
    """
    records = [json.loads(record_path(folder, shard).read_text()) for shard in range(plan.shards)]
    labels = np.array([label for record in records for label in record["labels"]], dtype=np.int64)
    if not len(labels):
        raise ValueError(f"no image of {plan.data['path']} can be read, so {folder} holds no latents")
    views, _, _, height, width = plan.image_shape
    count = len(labels) * views * height * width
    first, second = np.sum([record["moments"] for record in records], axis=0) / count
    header = CacheHeader(
        plan=read_plan(folder)[0],
        labels=labels,
        skipped=tuple((int(index), str(name)) for record in records for index, name in record["skipped"]),
        channel_mean=tuple(first.tolist()),
        channel_std=tuple(np.sqrt(np.maximum(second - first**2, 0)).tolist()),
        shards=tuple(LatentShard(record["images"], record["sha256"]) for record in records),
    )
    if header.skipped:
        write_atomically(folder / SKIPPED, "".join(f"{name}\n" for _, name in header.skipped), shared=True)
    write_json(folder / HEADER, header.to_dict())
    return header


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; several processes may write the same one at a time."""
    write_atomically(path, json.dumps(content) + "\n", shared=True)
