"""How far the scorer itself can be trusted: true scenes, clean and spoiled, against what is read back."""

from __future__ import annotations

import math

import torch
from scipy import ndimage
from torch import Tensor

from .detector import Found, parse
from .rendering import AREAS
from .sampling import Scenes
from .scene import Item, Scene

NEAR = 0.03
"""Greatest distance between an object and where it is found, as a share of the image's side."""


def spoiled(images: Tensor, blur: float, noise: float, seed: int) -> Tensor:
    """Images as a weak model might draw them: blurred, then with normal noise.

    Args:
        images: NCHW, [-1, 1]. blur: standard deviation as a share of the side. noise: standard deviation of each value.
    """
    width = blur * math.sqrt(images.shape[2] * images.shape[3])
    soft = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, width, width), mode="nearest"))
    return soft + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def read_back(scenes: Scenes, images: Tensor) -> Tensor:
    """Whether exactly the objects of each scene are found: shape, colour, size and place of all; bool, (S,)."""
    parsed = parse(images)
    return torch.tensor([_same(scenes.scene(s).items, found) for s, found in enumerate(parsed)])


def truth(scene: Scene) -> list[Found]:
    """What a parser without fault finds."""
    return [
        Found(item.shape, item.colour, item.x, item.y, item.radius, AREAS[item.shape] * item.radius**2, 1.0)
        for item in scene.items
    ]


def _same(items: tuple[Item, ...], found: list[Found]) -> bool:
    left = list(found)
    for item in items:
        match = next((thing for thing in left if _is(thing, item)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _is(thing: Found, item: Item) -> bool:
    same = (thing.shape, thing.colour, thing.size) == (item.shape, item.colour, item.size)
    return same and math.hypot(thing.x - item.x, thing.y - item.y) < NEAR
