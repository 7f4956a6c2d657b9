"""The table of a checkpoint: its files with their digests, and where each piece of each tensor lies.

It is JSON, written last, and carries a digest of itself. Files from strangers are not trusted: what it says is checked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .collective import CheckpointError
from .files import DTYPES, FileRecord, dtype_name, sha256
from .shards import Block, tiles, whole

FORMAT = 2
NAME = "manifest.json"
THREADS = 4
"""Files checked at a time."""


class SavedPiece(NamedTuple):
    """A box of a tensor in a file."""

    file: int
    """Which of the manifest's files."""
    block: Block


class SavedTensor(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[SavedPiece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Manifest(NamedTuple):
    """What a checkpoint holds."""

    step: int
    about: dict[str, Any]
    """What was given to `write`."""
    files: tuple[FileRecord, ...]
    tensors: dict[str, SavedTensor]

    def to_text(self) -> str:
        """As it is written."""
        body = {
            "format": FORMAT,
            "step": self.step,
            "about": self.about,
            "files": [file._asdict() for file in self.files],
            "tensors": {
                name: {
                    "dtype": dtype_name(tensor.dtype),
                    "shape": tensor.shape,
                    "pieces": [[piece.file, *piece.block] for piece in tensor.pieces],
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
            CheckpointError: there is none, or it contradicts itself.
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
        if any(Path(file.name).name != file.name for file in files):
            raise ValueError("a file outside the checkpoint")
        tensors = {}
        for name, entry in body["tensors"].items():
            shape = tuple(map(int, entry["shape"]))
            pieces = tuple(
                SavedPiece(int(file), Block(tuple(map(int, offsets)), tuple(map(int, sizes))))
                for file, offsets, sizes in entry["pieces"]
            )
            if not all(0 <= piece.file < len(files) for piece in pieces):
                raise ValueError(f"{name} is in a file that is not listed")
            if not tiles(shape, [piece.block for piece in pieces]):
                raise ValueError(f"the pieces of {name} do not make it up")
            tensors[name] = SavedTensor(DTYPES[entry["dtype"]], shape, pieces)
        if sum(tensor.nbytes for tensor in tensors.values()) > sum(file.bytes for file in files):
            raise ValueError("more tensors than the files can hold")
        return cls(int(body["step"]), dict(body["about"]), files, tensors)


def check_sizes(path: Path, files: tuple[FileRecord, ...]) -> None:
    """Whether files are there with all their bytes.

    Raises:
        CheckpointError: one is missing or cut short.
    """
    for record in files:
        file = path / record.name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {record.name}")
        if file.stat().st_size != record.bytes:
            raise CheckpointError(f"checkpoint {path}: {record.name} has {file.stat().st_size} bytes of {record.bytes}")


def check_digests(path: Path, files: tuple[FileRecord, ...]) -> None:
    """Whether files are as they were written.

    Raises:
        CheckpointError: one is missing, truncated or changed.
    """
    check_sizes(path, files)
    with ThreadPoolExecutor(THREADS) as pool:
        for record, digest in zip(files, pool.map(lambda record: sha256(path / record.name), files)):
            if digest != record.sha256:
                raise CheckpointError(f"checkpoint {path}: {record.name} is corrupt")


def piece_key(name: str, shape: tuple[int, ...], block: Block) -> str:
    """The name of a piece in its file: the tensor's own if it is whole, else with its place, as in `w[0:4,8:16]`."""
    if block == whole(shape):
        return name
    return f"{name}[{','.join(f'{start}:{start + size}' for start, size in zip(*block))}]"


def check_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what is to be said about a checkpoint, as JSON gives it back.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(_to_json(dict(about)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"what a checkpoint says about itself must be JSON: {error}") from error


def _to_json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
