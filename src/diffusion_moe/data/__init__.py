"""Data sets of images, and their order in training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import Batch, ImageDataset
    from .load import load_dataset
    from .order import Segment, batches_from, positions_of
    from .skipped import SkippedLog

# Imported on first use, so that listing and decoding files need no torch.
_MODULES = {
    "Batch": "dataset",
    "ImageDataset": "dataset",
    "Segment": "order",
    "SkippedLog": "skipped",
    "batches_from": "order",
    "load_dataset": "load",
    "positions_of": "order",
}

__all__ = ["Batch", "ImageDataset", "Segment", "SkippedLog", "batches_from", "load_dataset", "positions_of"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
