"""Data sets from a recipe's data section. Modules are imported on use, as torch and `datasets` take seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import DataConfig
from .image_table import ImageTable
from .splits import Split

if TYPE_CHECKING:
    from .dataset import ImageDataset


def load_dataset(config: DataConfig, split: Split, seed: int = 0) -> ImageDataset:
    """Load one split of the data set that a recipe names.

    Args:
        config: the data section.
        split: training or held-out images.
        seed: seed of the augmentation.

    Raises:
        ValueError: the data is missing, empty, damaged, or not as the recipe says.
    """
    dataset = _load(config, split, seed)
    if config.text_encoder is not None:
        from .captions import EncodedCaptions

        if not dataset.captions(0):
            raise ValueError(
                f"data.text_encoder is {config.text_encoder}, but the data has no captions; name them with "
                "data.caption_column"
            )
        dataset.texts = EncodedCaptions(config, dataset.captions, len(dataset))
    return dataset


def _load(config: DataConfig, split: Split, seed: int) -> ImageDataset:
    if config.kind == "digits":
        from .digits import Digits

        return Digits(config, split, seed)
    if config.kind == "shapes":
        from .shapes import Shapes

        return Shapes(config, split, seed)
    if config.kind == "latents":
        from .latents import LatentCache

        return LatentCache(config, split, seed)
    from .image_files import ImageFileDataset

    return ImageFileDataset(config, read_table(config), split, seed)


def read_table(config: DataConfig) -> ImageTable:
    """List the image files of all splits of a folder, a `datasets` table or tars; imports no torch.

    Raises:
        ValueError: the data is missing, empty, damaged, or not as the recipe says.
    """
    if config.kind == "folder":
        from .folder import read_folder

        return read_folder(config)
    if config.kind == "webdataset":
        from .webdataset import read_webdataset

        return read_webdataset(config)
    from .huggingface import read_huggingface

    return read_huggingface(config)
