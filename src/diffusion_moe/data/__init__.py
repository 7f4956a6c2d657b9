"""Images, and the order in which training sees them."""

from .dataset import Batch, ImageDataset, load_dataset
from .order import batches_from

__all__ = ["Batch", "ImageDataset", "batches_from", "load_dataset"]
