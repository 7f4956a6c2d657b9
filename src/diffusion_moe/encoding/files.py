"""Writing a latent cache: each shard appears whole, with a record of its hash, and the header when all are there.

Several processes, also on several machines, may work on one folder: what they write does not depend on who writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..data.latents import HEADER, SHARDS, CacheHeader, CachePlan, Shard, read_plan, shard_path

SKIPPED = "skipped.txt"
"""In the cache: the names of unreadable images, a line each."""


def claim(folder: Path, plan: CachePlan) -> None:
    """Begin a cache, or check that what is there is a part of the same one.

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
    old, new = _decisive(read_plan(folder)[0]), _decisive(plan)
    changes = [f"{name}: {_short(old[name])} -> {_short(new[name])}" for name in new if old[name] != new[name]]
    if changes:
        raise ValueError(f"output {folder} is another cache ({'; '.join(changes)}); choose another folder")


def _decisive(plan: CachePlan) -> dict[str, Any]:
    """The plan without what may differ between equal caches: where VAE and data lie."""
    content = json.loads(json.dumps(plan.to_dict()))
    data, space = content.pop("data"), content.pop("space")
    # Caches of before transparency was laid over a background hold other pixels, and name none.
    data = {"data": data["sha256"], "background": data.get("background")}
    return content | data | {"vae": space["encoder_sha256"], "scaling": space["scaling"]}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


class ShardWriter:
    """Writes one shard under a partial name; on leaving without an error it gets its own name, then its record."""

    def __init__(self, folder: Path, plan: CachePlan, shard: int) -> None:
        self.path, self.record_path = shard_path(folder, shard), record_path(folder, shard)
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self.digest = hashlib.sha256()
        self.labels: list[int] = []
        self.skipped: list[tuple[int, str]] = []
        self.moments = np.zeros((2, plan.latent_shape[0]))
        """Sums of x and of x^2 over images, views and places, a channel each, where x is drawn from the posterior."""

    def __enter__(self) -> ShardWriter:
        self.record_path.unlink(missing_ok=True)
        self.file = self.partial.open("wb")
        return self

    def skip(self, images: list[tuple[int, str]]) -> None:
        """Note images that are left out, by place and name."""
        self.skipped += images

    def add(self, latents: np.ndarray, labels: list[int]) -> None:
        """Append images, (B, views, parts, C, H, W), float16."""
        content = latents.tobytes()
        with _named(self.path):
            self.file.write(content)
        self.digest.update(content)
        self.labels += labels
        parts = latents.astype(np.float64)
        # E[x] is the average of the means, E[x^2] that of mean^2 + std^2; of a stored sample, those of x itself.
        axes = (0, 1, 3, 4)
        self.moments += np.stack([parts[:, :, 0].sum(axes), (parts**2).sum(axis=2).sum(axes)])

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):
                self.file.close()
            return
        with _named(self.path), self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.partial.replace(self.path)
        record = {
            "images": len(self.labels),
            "sha256": self.digest.hexdigest(),
            "labels": self.labels,
            "skipped": self.skipped,
            "moments": self.moments.tolist(),
        }
        write_json(self.record_path, record)


def record_path(folder: Path, shard: int) -> Path:
    """The file that says what a shard holds, from which the header is made."""
    return shard_path(folder, shard).with_suffix(".json")


def is_done(folder: Path, plan: CachePlan, shard: int, verify: bool) -> bool:
    """Whether a shard is there in its full length, and with `verify` has its hash."""
    path = shard_path(folder, shard)
    try:
        record = json.loads(record_path(folder, shard).read_text())
        good = path.stat().st_size == record["images"] * plan.row_bytes
        if good and verify:
            with path.open("rb") as file:
                good = hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return good


def missing_shards(folder: Path, plan: CachePlan) -> int:
    """How many shards are still to come."""
    return sum(not is_done(folder, plan, shard, verify=False) for shard in range(plan.shards))


def finish(folder: Path, plan: CachePlan) -> CacheHeader:
    """Write the header of a cache whose shards are all there.

    Raises:
        ValueError: not a single image could be read.
    """
    records = [json.loads(record_path(folder, shard).read_text()) for shard in range(plan.shards)]
    labels = np.array([label for record in records for label in record["labels"]], dtype=np.int64)
    if not len(labels):
        raise ValueError(f"no image of {plan.data['path']} can be read, so {folder} holds no latents")
    skipped = tuple((int(index), str(name)) for record in records for index, name in record["skipped"])
    _, H, W = plan.latent_shape
    numbers = len(labels) * (2 if plan.flip else 1) * H * W
    first, second = np.sum([record["moments"] for record in records], axis=0) / numbers
    header = CacheHeader(
        plan=read_plan(folder)[0],
        labels=labels,
        skipped=skipped,
        channel_mean=tuple(first.tolist()),
        channel_std=tuple(np.sqrt(np.maximum(second - first**2, 0)).tolist()),
        shards=tuple(Shard(record["images"], record["sha256"]) for record in records),
    )
    if skipped:
        _write(folder / SKIPPED, "".join(f"{name}\n" for _, name in skipped))
    write_json(folder / HEADER, header.to_dict())
    return header


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A failed write, as to a full disk, tells its file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, also where several processes write the same."""
    _write(path, json.dumps(content) + "\n")


def _write(path: Path, text: str) -> None:
    """As `run_folder.write_atomically`, but several processes may write the same file at a time."""
    partial = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.partial")
    with _named(path), partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
