"""Images, and the order in which training sees them."""

from .dataset import Batch, ImageDataset, load_dataset
from .order import Segment, batches_from, places_of
from .skipped import SkippedLog

__all__ = ["Batch", "ImageDataset", "Segment", "SkippedLog", "batches_from", "load_dataset", "places_of"]
