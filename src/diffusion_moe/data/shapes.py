"""The scenes as a data set with captions, drawn when they are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..config import DataConfig
from ..shapes.captions import caption
from ..shapes.rendering import render
from ..shapes.sampling import arrange, sample_contents
from ..shapes.scene import Content, contents
from .dataset import Batch, ImageDataset
from .splits import Split

SCENES = 100_000
"""Scenes of both splits together."""
SEED = 0
"""Of the scenes and captions: they are the same for every training."""
CAPTIONS = 4
"""Of each scene."""


class Shapes(ImageDataset):
    """Coloured shapes without classes. Scene i of a split is a function of (SEED, split, i)."""

    def __init__(self, config: DataConfig, split: Split, seed: int) -> None:
        super().__init__(config.flip, seed)
        if config.flip:
            raise ValueError("data.flip is true, but captions of shapes say left and right; set it to false")
        if config.path is not None:
            raise ValueError(f"data.path is {config.path}, but shapes are drawn, not read; leave it out")
        if config.channels != 3:
            raise ValueError(f"data.channels is {config.channels}, but shapes have colours; set it to 3")
        tested = round(SCENES * config.test_fraction)
        self.size, self.stream = config.image_size, f"shapes/{split}"
        self.layout = config.shapes_layout
        self.labels = np.zeros(tested if split == "test" else SCENES - tested, dtype="int64")
        self.class_names: list[str] = []
        self.contents = sample_contents(SEED, self.stream, torch.arange(len(self)))

    def read(self, indices: Sequence[int]) -> Batch:
        numbers = torch.as_tensor(list(indices), dtype=torch.int64)
        scenes = arrange(self.contents[numbers], SEED, self.stream, numbers, self.layout)
        return Batch(render(scenes, self.size), torch.zeros(len(numbers), dtype=torch.int64))

    def content(self, index: int) -> Content:
        """What a scene shows."""
        return contents()[int(self.contents[index])]

    def captions(self, index: int) -> list[str]:
        """The scene's captions, in an order that is part of the data: number k is the same for every caller."""
        content = self.content(index)
        return [caption(content, SEED, self.stream, index, number) for number in range(CAPTIONS)]
