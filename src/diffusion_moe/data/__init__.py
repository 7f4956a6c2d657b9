"""Images, and the order in which training sees them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import Batch, ImageDataset
    from .load import load_dataset
    from .order import Segment, batches_from, places_of
    from .skipped import SkippedLog

# Loaded when first asked for, so that listing and decoding files need no torch.
_HOME = {
    "Batch": "dataset",
    "ImageDataset": "dataset",
    "Segment": "order",
    "SkippedLog": "skipped",
    "batches_from": "order",
    "load_dataset": "load",
    "places_of": "order",
}

__all__ = ["Batch", "ImageDataset", "Segment", "SkippedLog", "batches_from", "load_dataset", "places_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
