"""Detecting objects in an image of coloured shapes by geometry alone: nothing here is learned.

Shapes: B images, H and W pixels, C = 6 colours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .rendering import AREAS, coverage, palette
from .scene import COLOURS, SHAPES, Colour, Shape, Size, size_of

SMOOTHING = 0.02
"""Standard deviation of the filter against noise, as a share of the image's side."""
BLURS = (1.0, 1.5, 2.0)
"""Blurs, relative to SMOOTHING, of the shapes that a patch is compared with: for sharp and for blurred images."""
SPECK = 0.01
"""Smaller patches, as a share of the image, are ignored."""
OFF_PALETTE = 0.37
"""Greatest distance of a pixel, RGB in [-1, 1], from the line between the background and a colour: a little less than
half of the distance between two colours, so that orange is neither red nor yellow."""
LEAST_FIT = 0.82
"""Least intersection over union with a rendered shape for a patch to count as that shape."""
RADII = (0.09, 0.35)
"""Least and greatest radius of a shape, as shares of the side: wider than those of scenes, but a filled image is not a
square."""
_OFF = len(COLOURS)


@dataclass(frozen=True)
class Detection:
    """A patch of one colour; lengths are shares of the image's side, y runs downwards."""

    shape: Shape | None
    """None if no shape fits."""
    colour: Colour | None
    """None if it is not of the palette."""
    x: float
    y: float
    radius: float
    """Radius of the best-fitting shape of the patch's area."""
    area: float
    """Share of the image."""
    fit: float
    """Intersection over union with that shape, 0 to 1."""

    @property
    def size(self) -> Size:
        return size_of(self.radius)


def detect(images: Tensor) -> list[list[Detection]]:
    """The objects of each image, from top to bottom.

    Args:
        images: (B, 3, H, W), [-1, 1]; values outside are clipped.

    Raises:
        ValueError: they are not colour images, or hold values that are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have the shape {tuple(images.shape)}; give (images, 3, height, width)")
    if not images.isfinite().all():
        raise ValueError("images hold values that are not finite; generate them again")
    pixels = images.detach().float().cpu().clamp(-1, 1)
    width = SMOOTHING * math.sqrt(pixels.shape[2] * pixels.shape[3])
    smooth = ndimage.gaussian_filter(pixels.numpy(), (0, 0, width, width), mode="nearest")
    labels, alphas = segment(torch.from_numpy(smooth))
    return [_objects(label, alpha) for label, alpha in zip(labels.numpy(), alphas.numpy())]


def segment(images: Tensor) -> tuple[Tensor, Tensor]:
    """Colour and share of the colour of each pixel.

    A pixel at the edge of an object mixes its colour and the background: it belongs to the colour whose line from the
    background is nearest, and is part of the object from one half on.

    Returns:
        labels: int64, (B, H, W): a colour's index, 6 off the palette, -1 background.
        alphas: share of the colour, (B, H, W), [0, 1].
    """
    background, colours = palette()
    rays = colours - background  # (C, 3)
    pixels = images.permute(0, 2, 3, 1) - background
    shares = (pixels @ rays.T / rays.square().sum(1)).clamp(0, 1)  # (B, H, W, C)
    distances = (pixels[..., None, :] - shares[..., None] * rays).norm(dim=-1)
    distance, labels = distances.min(-1)
    alphas = shares.gather(-1, labels[..., None])[..., 0]
    labels = torch.where(alphas > 0.5, labels, -1)
    return torch.where(distance > OFF_PALETTE, _OFF, labels), alphas


def _objects(labels: np.ndarray, alphas: np.ndarray) -> list[Detection]:
    found = []
    for colour in np.unique(labels[labels >= 0]):
        patches, _ = ndimage.label(labels == colour)
        for number, where in enumerate(ndimage.find_objects(patches), start=1):
            mask = patches[where] == number
            if mask.sum() < SPECK * labels.size:
                continue
            reach = 1 + round(2 * SMOOTHING * math.sqrt(labels.size))
            window = tuple(slice(max(0, part.start - reach), part.stop + reach) for part in where)
            own = patches[window] == number
            near = ndimage.binary_dilation(own, iterations=reach) & (labels[window] < 0)
            alpha = np.where(own | near, alphas[window], 0)
            found.append(_classify(alpha, window, labels.shape, None if colour == _OFF else list(COLOURS)[colour]))
    return sorted(found, key=lambda one: (one.y, one.x))


def _classify(alpha: np.ndarray, window: tuple[slice, ...], image: tuple[int, ...], colour: Colour | None) -> Detection:
    """The shape with which a patch's alphas, (h, w), overlap best."""
    area = float(alpha.sum())
    y, x = (float((alpha.sum(1 - axis) * (np.arange(alpha.shape[axis]) + 0.5)).sum()) / area for axis in (0, 1))
    rendered = np.stack([_rendered(shape, x, y, math.sqrt(area / AREAS[shape]), alpha.shape) for shape in SHAPES])
    side = math.sqrt(image[0] * image[1])
    overlaps = []
    for blur in BLURS:
        width = blur * SMOOTHING * side
        soft = ndimage.gaussian_filter(rendered, (0, width, width), mode="constant")
        overlaps.append(np.minimum(soft, alpha).sum((1, 2)) / np.maximum(soft, alpha).sum((1, 2)))
    fits = dict(zip(SHAPES, np.max(overlaps, 0).tolist()))
    best = max(SHAPES, key=fits.__getitem__)
    radius = math.sqrt(area / AREAS[best]) / side
    fitting = colour and fits[best] >= LEAST_FIT and RADII[0] <= radius <= RADII[1]
    x, y = (window[1].start + x) / image[1], (window[0].start + y) / image[0]
    return Detection(best if fitting else None, colour, x, y, radius, area / side**2, fits[best])


def _rendered(shape: Shape, x: float, y: float, radius: float, size: tuple[int, ...]) -> np.ndarray:
    """Coverage of one object, (h, w)."""
    xs, ys, radii = torch.tensor([[x], [y], [radius]])
    return coverage(shape, xs, ys, radii, (size[0], size[1]))[0].numpy()
