"""Data sets from a recipe's data section. Modules that need torch or `datasets` are imported on use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..config.data import IMAGE_FILES, DataConfig
from .folder import read_folder
from .image_table import ImageTable, Split
from .webdataset import read_webdataset

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
    from .captions import EncodedCaptions
    from .digits import Digits
    from .image_files import ImageFileDataset
    from .latents import LatentCache
    from .shapes import Shapes

    if config.kind in IMAGE_FILES:
        dataset: ImageDataset = ImageFileDataset(config, read_table(config), split, seed)
    else:
        kinds: dict[str, Callable[..., ImageDataset]] = {"digits": Digits, "shapes": Shapes, "latents": LatentCache}
        dataset = kinds[config.kind](config, split, seed)
    if not len(dataset) and config.path is not None:
        raise ValueError(f"data.path {config.path} gives no image for the {split} split; see data.test_fraction")
    if config.text_encoder is not None:
        if not dataset.captions(0):
            raise ValueError(
                f"data.text_encoder is {config.text_encoder}, but the data has no captions; name them with "
                "data.caption_column"
            )
        dataset.texts = EncodedCaptions(config, dataset.captions, len(dataset))
    return dataset


def read_table(config: DataConfig) -> ImageTable:
    """List the image files of all splits of a folder, a `datasets` table or tars; imports no torch.

    Raises:
        ValueError: the data is missing, empty, damaged, or not as the recipe says.
    """
    if config.kind == "huggingface":
        from .huggingface import read_huggingface

        return read_huggingface(config)
    return {"folder": read_folder, "webdataset": read_webdataset}[config.kind](config)
