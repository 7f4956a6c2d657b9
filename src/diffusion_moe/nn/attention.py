"""Attention layers: over the tokens of one image, and from these to the tokens of a text.

Shape suffixes: B images, N tokens of an image, L tokens of a text, D width, H heads, I head width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..import_hooks import when_imported
from .norm import HeadNorm
from .position import Rotary, apply_rotary

MASKED_BACKENDS = (None, "native")
"""diffusers' attention backends that take the mask of sinks and windows."""


def native_attention(
    q_BNHI: Tensor, k_BNHI: Tensor, v_BNHI: Tensor, dropout_p: float, enable_gqa: bool, **_: Any
) -> Tensor:
    """PyTorch's attention, which is also the default of diffusers."""
    q, k, v = q_BNHI.transpose(1, 2), k_BNHI.transpose(1, 2), v_BNHI.transpose(1, 2)
    y_BHNI = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, enable_gqa=enable_gqa)
    return y_BHNI.transpose(1, 2)


class Heads(nn.Module):
    """Heads of an attention layer: projections into them and out of them, and their norms.

    Args:
        dim: D.
        num_heads: H.
        num_kv_heads: key and value heads; None: H; fewer than H is grouped-query attention.
        qk_norm: RMSNorm with learned scale on each head of queries and keys.
        head_dim: I; None: D / H.
        dropout: dropout after the output projection, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        head_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = head_dim or dim // num_heads
        self.make_input_projections(dim)
        self.proj = nn.Linear(num_heads * self.head_dim, dim)
        self.q_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def make_input_projections(self, dim: int) -> None:
        """Make the linear layers of queries, keys and values."""
        raise NotImplementedError


class SelfAttention(Heads):
    """Attention over the tokens of an image. Queries, keys and values have biases.

    diffusers' `set_attention_backend` chooses the kernel. For the arguments not listed here see `Heads`.

    Args:
        sinks: add a learned logit to the softmax of each head; its share of the attention has value zero.
        window: attend only if |i - j| < window for token indices i and j; 0: everywhere.
        attention_dropout: dropout of the attention weights, in training.
    """

    _supports_qkv_fusion = False  # they are one matrix already
    processor: AttentionProcessor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        head_dim: int | None = None,
        sinks: bool = False,
        window: int = 0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, qk_norm, head_dim, dropout)
        self.window, self.attention_dropout = window, attention_dropout
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.processor = AttentionProcessor()

    def make_input_projections(self, dim: int) -> None:
        self.qkv = nn.Linear(dim, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim)

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None) -> Tensor:
        return self.processor(self, x_BND, rotary)

    def project(self, x_BND: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, I), keys and values (B, kv heads, N, I)."""
        # Rows of qkv: all queries, then all keys, then all values.
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv_BHNI = self.qkv(x_BND).unflatten(-1, (heads + 2 * kv_heads, self.head_dim)).transpose(1, 2)
        q, k, v = qkv_BHNI.split((heads, kv_heads, kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return q, k.to(q.dtype), v.to(q.dtype)

    def masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention with sinks or a window, (B, H, N, I).

        A sink is one more key, whose logit is learned and whose value is zero.
        """
        B, H, N, _ = q.shape
        bias_HNM = q.new_zeros(H, N, N)
        if self.window:
            positions = torch.arange(N, device=q.device)
            far = (positions[:, None] - positions).abs() >= self.window
            bias_HNM = bias_HNM.masked_fill(far, -torch.inf)
        if self.sinks is not None:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            bias_HNM = torch.cat((bias_HNM, self.sinks.to(q.dtype)[:, None, None].expand(H, N, 1)), dim=-1)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias_HNM.expand(B, -1, -1, -1),
            dropout_p=self.attention_dropout if self.training else 0.0,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )


class AttentionProcessor:
    """Computation of `SelfAttention`, by the backend that diffusers' `set_attention_backend` chose."""

    _attention_backend: str | None = None
    _parallel_config: Any = None
    attend = staticmethod(native_attention)

    def __call__(self, attention: SelfAttention, x_BND: Tensor, rotary: Rotary | None) -> Tensor:
        q, k, v = attention.project(x_BND, rotary)
        if attention.sinks is not None or attention.window:
            if self._attention_backend not in MASKED_BACKENDS:
                raise ValueError(
                    f"attention backend {self._attention_backend} takes no mask, which attention_sinks and "
                    "sliding_window need; use set_attention_backend('native')"
                )
            y_BNHI = attention.masked(q, k, v).transpose(1, 2)
        else:
            y_BNHI = self.attend(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                dropout_p=attention.attention_dropout if attention.training else 0.0,
                enable_gqa=attention.num_heads != attention.num_kv_heads,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        return attention.dropout(attention.proj(y_BNHI.flatten(2)))


class CrossAttention(Heads):
    """Attention from the tokens of an image to those of a text, with PyTorch's kernels, which take a mask."""

    def make_input_projections(self, dim: int) -> None:
        self.q = nn.Linear(dim, self.num_heads * self.head_dim)
        self.kv = nn.Linear(dim, 2 * self.num_kv_heads * self.head_dim)

    def forward(self, x_BND: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Attend where the mask is true; each text needs at least one true value."""
        q_BHNI = self.q_norm(self.q(x_BND).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))
        kv_BHLI = self.kv(text_BLD).unflatten(-1, (2 * self.num_kv_heads, self.head_dim)).transpose(1, 2)
        k_BHLI, v_BHLI = kv_BHLI.chunk(2, dim=1)
        k_BHLI = self.k_norm(k_BHLI)
        y_BHNI = F.scaled_dot_product_attention(
            q_BHNI,
            k_BHLI.to(q_BHNI.dtype),
            v_BHLI.to(q_BHNI.dtype),
            attn_mask=mask_BL[:, None, None],
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.dropout(self.proj(y_BHNI.transpose(1, 2).flatten(2)))


def _use_attention_layers(module: ModuleType) -> None:
    SelfAttention.__bases__ = (Heads, module.AttentionModuleMixin)


def _use_attention_backends(module: ModuleType) -> None:
    AttentionProcessor.attend = staticmethod(module.dispatch_attention_fn)


when_imported("diffusers.models.attention", _use_attention_layers)
when_imported("diffusers.models.attention_dispatch", _use_attention_backends)
