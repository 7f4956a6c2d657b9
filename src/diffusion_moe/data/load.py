"""From a recipe's data section to its data set."""

from __future__ import annotations

from ..config import DataConfig
from .captions import EncodedCaptions
from .dataset import ImageDataset
from .reading import read_table
from .splits import Split


def load_dataset(config: DataConfig, split: Split, seed: int = 0) -> ImageDataset:
    """Load one split of the data set that a recipe names.

    Args:
        config: the data section.
        split: training or held-out images.
        seed: of the augmentation.

    Raises:
        ValueError: it is missing, empty, damaged, or not as the recipe says.
    """
    dataset = _load(config, split, seed)
    if config.text_encoder is not None:
        if not dataset.captions(0):
            raise ValueError(
                f"data.text_encoder is {config.text_encoder}, but the data has no captions; name them with "
                "data.caption_column"
            )
        dataset.texts = EncodedCaptions(config, dataset.captions, len(dataset))
    return dataset


# A kind's own module is imported when it is asked for: scikit-learn and `datasets` take seconds.
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
    from .table import TableImages

    return TableImages(config, read_table(config), split, seed)
