"""Embeddings of patches, time and class. Shape suffixes: B images, N tokens, D width, C channels, P patch side."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .position import BASE

TIME_FREQUENCIES = 256


def patchify(x_BCHW: Tensor, patch_size: int) -> Tensor:
    """Turn (B, C, H, W) into (B, N, C * P * P): tokens row by row, each patch channel by channel."""
    B, C, H, W = x_BCHW.shape
    P = patch_size
    return x_BCHW.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)


def unpatchify(x_BNO: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Turn (B, N, P * P * C) into (B, C, height, width); a patch has its channels last (as DiT's final layer)."""
    B, P = len(x_BNO), patch_size
    x = x_BNO.reshape(B, height // P, width // P, P, P, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, height, width)


class TimestepEmbedder(nn.Module):
    """Embedding of times, (B,), as (B, D): 128 cosines and 128 sines, base 10000, then a two-layer network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        frequencies = torch.exp(-math.log(BASE) / half * torch.arange(half, device=t_B.device, dtype=torch.float32))
        angle = t_B.float()[:, None] * frequencies
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))
