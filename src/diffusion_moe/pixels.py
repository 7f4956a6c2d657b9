"""Images as 8-bit pixels."""

from __future__ import annotations

import math

import torch
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
