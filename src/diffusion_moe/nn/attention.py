"""Self-attention over the tokens of one image. Shape suffixes: B images, N tokens, D width, H heads, I head width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .norm import HeadNorm
from .position import Rotary, apply_rotary


class SelfAttention(nn.Module):
    """Multi-head attention through `scaled_dot_product_attention`; queries, keys and values have biases.

    Args:
        dim: D. num_heads: H. num_kv_heads: key and value heads; fewer than H is grouped-query attention.
        qk_norm: RMSNorm with learned scale on each head of queries and keys.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, (num_heads + 2 * self.num_kv_heads) * self.head_dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Attend; rows of qkv are all queries, then all keys, then all values."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv_BHNI = self.qkv(x_BND).unflatten(-1, (heads + 2 * kv_heads, self.head_dim)).transpose(1, 2)
        q, k, v = qkv_BHNI.split((heads, kv_heads, kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        y_BHNI = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), enable_gqa=heads != kv_heads)
        return self.proj(y_BHNI.transpose(1, 2).flatten(2))
