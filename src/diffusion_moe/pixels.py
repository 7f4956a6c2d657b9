"""Images as 8-bit pixels."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0 ... 255, NCHW, rounded and clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Images in rows of `columns` with a one-pixel gap, uint8 HWC (one or three channels)."""
    pixels = to_uint8(images)
    S, C, H, W = pixels.shape
    rows = math.ceil(S / columns)
    canvas = torch.full((C, rows * (H + 1) + 1, columns * (W + 1) + 1), 96, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (H + 1) + 1, (i % columns) * (W + 1) + 1
        canvas[:, top : top + H, left : left + W] = image
    return canvas.permute(1, 2, 0).contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """A picture of uint8 HWC pixels of one or three channels."""
    return Image.fromarray((pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).numpy())
