"""Safetensors files, written and hashed as a stream in the memory of one tensor."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .collective import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of dtypes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 24
"""Bytes hashed and written at a time."""


class Entry(NamedTuple):
    """A tensor to be written into a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    """Called when the tensor is written; its result may be on any device."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class FileRecord(NamedTuple):
    """A written file."""

    name: str
    bytes: int
    sha256: str


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a dtype.

    Raises:
        CheckpointError: safetensors cannot store it.
    """
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"a tensor of {dtype} cannot be saved; the dtypes are {', '.join(DTYPES)}")
    return DTYPE_NAMES[dtype]


def write_safetensors(path: Path, entries: Iterable[Entry]) -> FileRecord:
    """Write a safetensors file and wait until it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    # The largest elements first, so that every tensor starts at a multiple of its element's size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        header = _header(entries)
        digest.update(header)
        size += file.write(header)
        for entry in entries:
            data = _bytes_of(entry.load())
            assert len(data) == entry.nbytes, entry.key
            for start in range(0, len(data), CHUNK):
                digest.update(data[start : start + CHUNK])
                size += file.write(data[start : start + CHUNK])
            del data  # before the next tensor is loaded
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, size, digest.hexdigest())


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header(entries: Iterable[Entry]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.nbytes
        content[entry.key] = {
            "dtype": dtype_name(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
