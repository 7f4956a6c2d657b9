"""From a recipe's data section to its table of image files; imports no torch."""

from __future__ import annotations

from ..config import DataConfig
from .image_table import Table


def read_table(config: DataConfig) -> Table:
    """List the image files of a folder, a `datasets` table or tars, of all splits.

    Raises:
        ValueError: it is missing, empty, damaged, or not as the recipe says.
    """
    if config.kind == "folder":
        from .folder import read_folder

        return read_folder(config)
    if config.kind == "webdataset":
        from .webdataset import read_webdataset

        return read_webdataset(config)
    from .huggingface import read_huggingface

    return read_huggingface(config)
