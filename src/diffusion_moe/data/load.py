"""Data sets from a recipe's data section. The modules of a kind are imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..config.data import IMAGE_FILES, DataConfig

if TYPE_CHECKING:
    from .dataset import ImageDataset
    from .image_table import ImageTable, Split

OTHER_KINDS = {"digits": "Digits", "shapes": "Shapes", "latents": "LatentCache"}
"""Classes of the kinds that are not read from image files, each in a module of its kind's name."""


def load_dataset(config: DataConfig, split: Split, seed: int = 0) -> ImageDataset:
    """Load one split of the data set that a recipe names.

    Args:
        config: the data section.
        split: training or held-out images.
        seed: seed of the augmentation.

    Raises:
        ValueError: the data is missing, empty, damaged, or not as the recipe says.
    """
    if config.kind in IMAGE_FILES:
        from .image_files import ImageFileDataset

        dataset: ImageDataset = ImageFileDataset(config, read_table(config), split, seed)
    else:
        module = import_module(f".{config.kind}", __package__)
        dataset = getattr(module, OTHER_KINDS[config.kind])(config, split, seed)
    if not len(dataset) and config.path is not None:
        raise ValueError(f"data.path {config.path} gives no image for the {split} split; see data.test_fraction")
    if config.text_encoder is not None:
        if not dataset.captions(0):
            raise ValueError(
                f"data.text_encoder is {config.text_encoder}, but the data has no captions; name them with "
                "data.caption_column"
            )
        from .captions import EncodedCaptions

        dataset.texts = EncodedCaptions(config, dataset.captions, len(dataset))
    return dataset


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
