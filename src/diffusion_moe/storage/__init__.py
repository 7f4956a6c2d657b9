"""Checkpoint files: sharded safetensors with a JSON manifest, for any number of processes; see docs/checkpoints.md.

step-00001000/
    manifest.json                        what was said about it; files with sizes and SHA-256; where each piece lies
    tensors-00000-000.safetensors        what rank 0 wrote; several files if it is much
    tensors-00001-000.safetensors        what rank 1 wrote
"""

from .async_writer import AsyncWriter
from .collective import TIMEOUT, CheckpointError, LostProcess, storage_group
from .manifest import Manifest
from .reading import Found, export, latest, read
from .writing import checkpoint_path, checkpoints_in, prune, write

__all__ = [
    "TIMEOUT",
    "AsyncWriter",
    "CheckpointError",
    "Found",
    "LostProcess",
    "Manifest",
    "checkpoint_path",
    "checkpoints_in",
    "export",
    "latest",
    "prune",
    "read",
    "storage_group",
    "write",
]
