"""Scenes of coloured shapes as tensors."""

import torch

from diffusion_moe.shapes.sampling import Scenes
from diffusion_moe.shapes.scene import COLOURS, MAX_COUNT, SHAPES


def scenes_of(*scenes):
    """Given scenes as tensors."""
    whole, real = torch.zeros(2, len(scenes), MAX_COUNT).long(), torch.zeros(3, len(scenes), MAX_COUNT)
    for s, scene in enumerate(scenes):
        for i, item in enumerate(scene.items):
            whole[:, s, i] = torch.tensor([SHAPES.index(item.shape), list(COLOURS).index(item.colour)])
            real[:, s, i] = torch.tensor([item.x, item.y, item.radius])
    return Scenes(*whole, *real)
