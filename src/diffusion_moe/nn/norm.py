"""Normalisation without learned scale, and its modulation by the conditioning."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

EPS = 1e-6


def make_norm(kind: Literal["layernorm", "rmsnorm"], dim: int) -> nn.Module:
    """LayerNorm or RMSNorm over the last axis, eps 1e-6, no parameters: adaLN supplies scale and shift."""
    if kind == "layernorm":
        return nn.LayerNorm(dim, elementwise_affine=False, eps=EPS)
    return nn.RMSNorm(dim, elementwise_affine=False, eps=EPS)


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, per image (DiT section 3.2, adaLN)."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]
