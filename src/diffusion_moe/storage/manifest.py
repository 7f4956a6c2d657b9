"""Manifest of a checkpoint: its files with their digests, and the file of each shard of each tensor.

It is JSON, written last, and contains a digest of itself. All it claims is checked: a file may be from a stranger.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .collective import CheckpointError
from .files import DTYPES, FileRecord, dtype_name, sha256
from .shards import Block, tiles, whole

FORMAT = 3
NAME = "manifest.json"
FILE_NAME = re.compile(r"tensors-[0-9]+-[0-9]+\.safetensors")
MAX_SHARDS = 1 << 14
"""Most shards of a tensor: the check that they do not overlap takes the square of their number."""
THREADS = 4
"""Files checked at a time."""


class SavedShard(NamedTuple):
    """A block of a tensor in a file."""

    file: int
    """Index into the manifest's files."""
    block: Block


class SavedTensor(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: tuple[SavedShard, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Manifest(NamedTuple):
    """Content of a checkpoint."""

    step: int
    metadata: dict[str, Any]
    """Metadata given to `AsyncWriter.save`."""
    files: tuple[FileRecord, ...]
    tensors: dict[str, SavedTensor]

    def to_text(self) -> str:
        """The file's text, with its digest."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "metadata": self.metadata,
            "files": [file._asdict() for file in self.files],
            "tensors": {
                name: {
                    "dtype": dtype_name(tensor.dtype),
                    "shape": tensor.shape,
                    "shards": [[shard.file, *shard.block] for shard in tensor.shards],
                }
                for name, tensor in self.tensors.items()
            },
        }
        text = _to_json(body)
        return f'{text[:-1]},"sha256":"{_digest(text)}"}}\n'

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of the checkpoint in a folder.

        Raises:
            CheckpointError: it is missing, damaged or contradicts itself.
        """
        try:
            body = json.loads((path / NAME).read_text())
            if body["format"] != FORMAT:
                raise CheckpointError(
                    f"checkpoint {path} has format {body['format']}; this version reads format {FORMAT}"
                )
            if body.pop("sha256") != _digest(_to_json(body)):
                raise CheckpointError(f"checkpoint {path}: {NAME} is corrupt")
            return cls._parse(body)
        except CheckpointError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"checkpoint {path} has no readable {NAME} ({type(error).__name__})") from error

    @classmethod
    def _parse(cls, body: dict[str, Any]) -> Manifest:
        files = tuple(FileRecord(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in body["files"])
        if not all(FILE_NAME.fullmatch(file.name) for file in files):
            raise ValueError("a file outside the checkpoint")
        tensors = {}
        for name, entry in body["tensors"].items():
            shape = tuple(map(int, entry["shape"]))
            shards = tuple(
                SavedShard(int(file), Block(tuple(map(int, offsets)), tuple(map(int, sizes))))
                for file, offsets, sizes in entry["shards"]
            )
            if not all(0 <= shard.file < len(files) for shard in shards):
                raise ValueError(f"{name} is in a file that is not listed")
            if len(shards) > MAX_SHARDS:
                raise ValueError(f"{name} has {len(shards)} shards")
            if not tiles(shape, [shard.block for shard in shards]):
                raise ValueError(f"the shards of {name} do not cover it once")
            tensors[name] = SavedTensor(DTYPES[entry["dtype"]], shape, shards)
        if sum(tensor.nbytes for tensor in tensors.values()) > sum(file.bytes for file in files):
            raise ValueError("more tensors than the files can hold")
        return cls(int(body["step"]), dict(body["metadata"]), files, tensors)


def check_sizes(path: Path, files: tuple[FileRecord, ...]) -> None:
    """Check that files exist with their recorded size.

    Raises:
        CheckpointError: one is missing or truncated.
    """
    for record in files:
        file = path / record.name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {record.name}")
        if file.stat().st_size != record.bytes:
            raise CheckpointError(f"checkpoint {path}: {record.name} has {file.stat().st_size} bytes of {record.bytes}")


def check_digests(path: Path, files: tuple[FileRecord, ...]) -> None:
    """Check files against their SHA-256.

    Raises:
        CheckpointError: one is missing, truncated or changed.
    """
    check_sizes(path, files)
    with ThreadPoolExecutor(THREADS) as pool:
        for record, digest in zip(files, pool.map(lambda record: sha256(path / record.name), files)):
            if digest != record.sha256:
                raise CheckpointError(f"checkpoint {path}: {record.name} is corrupt")


def shard_key(name: str, shape: tuple[int, ...], block: Block) -> str:
    """Name of a shard in its file: the tensor's own if it is whole, else with its range, as in `w[0:4,8:16]`."""
    if block == whole(shape):
        return name
    return f"{name}[{','.join(f'{start}:{start + size}' for start, size in zip(*block))}]"


def check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of metadata as JSON restores it.

    Raises:
        ValueError: they are not JSON.
    """
    try:
        return json.loads(_to_json(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata of a checkpoint must be JSON: {error}") from error


def _to_json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
