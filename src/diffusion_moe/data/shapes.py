"""Scenes of coloured shapes as a data set with captions, rendered when they are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..config import DataConfig, require
from ..shapes.captions import caption
from ..shapes.rendering import render
from ..shapes.sampling import arrange, sample_contents
from ..shapes.scene import Content, contents
from .dataset import Batch, ImageDataset
from .image_table import Split

SCENES = 100_000
"""Scenes of both splits together."""
SEED = 0
"""Seed of scenes and captions, the same for every training."""
CAPTIONS = 4
"""Captions of each scene."""


class Shapes(ImageDataset):
    """Coloured shapes without classes. Scene i of a split is a function of (SEED, split, i)."""

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        require(not config.flip, "data.flip is true, but captions of shapes say left and right; set it to false")
        require(config.path is None, f"data.path is {config.path}, but shapes are rendered, not read; remove it")
        require(config.channels == 3, f"data.channels is {config.channels}, but shapes have colours; set it to 3")
        test = round(SCENES * config.test_fraction)
        self.size = config.image_size
        self.stream = f"shapes/{split}"
        self.layout = config.shapes_layout
        self.labels = np.zeros(test if split == "test" else SCENES - test, dtype=np.int64)
        self.class_names: list[str] = []
        self.contents = sample_contents(SEED, self.stream, torch.arange(len(self)))

    def read(self, indices: Sequence[int]) -> Batch:
        requested = torch.as_tensor(list(indices), dtype=torch.int64)
        scenes = arrange(self.contents[requested], SEED, self.stream, requested, self.layout)
        return Batch(render(scenes, self.size), torch.zeros_like(requested))

    def content(self, index: int) -> Content:
        """Content of a scene."""
        return contents()[int(self.contents[index])]

    def captions(self, index: int) -> list[str]:
        """Captions of a scene, in an order that is part of the data."""
        content = self.content(index)
        return [caption(content, SEED, self.stream, index, number) for number in range(CAPTIONS)]
