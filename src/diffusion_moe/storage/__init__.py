"""Checkpoint files: sharded safetensors with a JSON manifest, for any number of processes; see docs/checkpoints.md.

step-00001000/
    manifest.json                        metadata; files with sizes and SHA-256; the position of each shard
    tensors-00000-000.safetensors        written by rank 0; several files if it is large
    tensors-00001-000.safetensors        written by rank 1
"""

from .async_writer import AsyncWriter
from .collective import CheckpointError, LostProcess
from .manifest import Manifest
from .reading import LoadedCheckpoint, export, latest, read
from .writing import checkpoint_path, checkpoints_in, prune, step_of

__all__ = [
    "AsyncWriter",
    "CheckpointError",
    "LoadedCheckpoint",
    "LostProcess",
    "Manifest",
    "checkpoint_path",
    "checkpoints_in",
    "export",
    "latest",
    "prune",
    "read",
    "step_of",
]
