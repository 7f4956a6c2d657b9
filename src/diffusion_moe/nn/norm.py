"""Normalisation of tokens and heads, and its modulation by the conditioning."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def make_norm(kind: Literal["layernorm", "rmsnorm"], dim: int) -> nn.Module:
    """A norm over the last axis, eps 1e-6: LayerNorm without parameters, or RMSNorm with a learned scale.

    adaLN gives scale and shift; the papers' models with RMSNorm learn its scale too.
    """
    return nn.LayerNorm(dim, elementwise_affine=False, eps=EPS) if kind == "layernorm" else nn.RMSNorm(dim, eps=EPS)


class HeadNorm(nn.RMSNorm):
    """RMSNorm with a learned scale over each head of queries or keys, in their dtype (QK-norm)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=EPS)

    def forward(self, x_BHNI: Tensor) -> Tensor:
        return F.rms_norm(x_BHNI, self.normalized_shape, self.weight.to(x_BHNI.dtype), self.eps)


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """x (1 + scale) + shift, per image (DiT section 3.2, adaLN)."""
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]
