"""Attention layers: over the tokens of one image, and from these to the tokens of a text.

Shape suffixes: B images, N tokens of an image, L tokens of a text, M keys, D width, H heads, K heads of keys and
values, I head width.
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


def attention(
    q_BHNI: Tensor,
    k_BKMI: Tensor,
    v_BKMI: Tensor,
    mask: Tensor | None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's attention, (B, H, N, I).

    Heads of keys and values are repeated where a mask is given: on a GPU the kernels that take a mask want as many of
    them as of queries, and the plain formula would run instead, which writes all attention weights to memory.

    Args:
        q_BHNI: queries.
        k_BKMI: keys; K divides H.
        v_BKMI: values.
        mask: true where a query attends to a key, broadcast to (B, H, N, M); None: everywhere.
        dropout_p: dropout of the attention weights.
        scale: factor on the logits; None: I ** -0.5.
    """
    grouped = q_BHNI.shape[1] != k_BKMI.shape[1]
    if grouped and mask is not None:
        times = q_BHNI.shape[1] // k_BKMI.shape[1]
        k_BKMI, v_BKMI = repeated(k_BKMI, times), repeated(v_BKMI, times)
    return F.scaled_dot_product_attention(
        q_BHNI,
        k_BKMI,
        v_BKMI,
        attn_mask=mask,
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=grouped and mask is None,
    )


def repeated(k_BKMI: Tensor, times: int) -> Tensor:
    """Each head of keys or values for so many consecutive heads of queries, (B, H, M, I)."""
    return k_BKMI[:, :, None].repeat(1, 1, times, 1, 1).flatten(1, 2)


def with_sink_key(q_BHNI: Tensor, k_BKNI: Tensor, v_BKNI: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with one more key, whose logit is that of its head's sink and whose value is zero.

    The logits are in one more channel: the sink's logit in the queries, and one in the new key, zero in the others. A
    bias on all logits would say the same, but kernels that take one are slower and keep its gradient for each image.
    Heads grow by 8 channels, because kernels want multiples of 8. The logits' scale stays I ** -0.5.
    """
    B, H, N, I = q_BHNI.shape  # noqa: E741
    sink_BHN1 = (sinks_H * I**0.5).to(q_BHNI.dtype)[:, None, None].expand(B, H, N, 1)
    q_BHNI = F.pad(torch.cat((q_BHNI, sink_BHN1), dim=-1), (0, 7))
    k_BKNI, v_BKNI = F.pad(k_BKNI, (0, 8, 0, 1)), F.pad(v_BKNI, (0, 8, 0, 1))
    k_BKNI[:, :, N, I] = 1
    return q_BHNI, k_BKNI, v_BKNI


def window_mask(x_BND: Tensor, window: int, sinks: bool) -> Tensor | None:
    """Mask of a window, true where token indices i and j have |i - j| < window, (N, M); None for window 0: everywhere.

    With sinks there is one more key than tokens (see `with_sink_key`), which all tokens attend to.
    """
    if not window:
        return None
    tokens, device = x_BND.shape[1], x_BND.device
    query_N, key_M = torch.arange(tokens, device=device), torch.arange(tokens + sinks, device=device)
    return ((query_N[:, None] - key_M).abs() < window) | (key_M >= tokens)


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
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, qk_norm, head_dim, dropout)
        self.attention_dropout = attention_dropout
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.processor = AttentionProcessor()

    def make_input_projections(self, dim: int) -> None:
        self.qkv = nn.Linear(dim, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim)

    def forward(self, x_BND: Tensor, rotary: Rotary | None = None, mask_NM: Tensor | None = None) -> Tensor:
        """Attend to all tokens, or where `window_mask` is true."""
        return self.processor(self, x_BND, rotary, mask_NM)

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

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask_NM: Tensor | None) -> Tensor:
        """Attention with sinks or a window, (B, H, N, I)."""
        if self.sinks is not None:
            q, k, v = with_sink_key(q, k, v, self.sinks)
        y_BHNI = attention(q, k, v, mask_NM, self.attention_dropout if self.training else 0.0, self.head_dim**-0.5)
        return y_BHNI[..., : self.head_dim]


class AttentionProcessor:
    """Computation of `SelfAttention`, by the backend that diffusers' `set_attention_backend` chose."""

    _attention_backend: str | None = None
    _parallel_config: Any = None
    attend = staticmethod(native_attention)

    def __call__(
        self, attention: SelfAttention, x_BND: Tensor, rotary: Rotary | None, mask_NM: Tensor | None
    ) -> Tensor:
        q, k, v = attention.project(x_BND, rotary)
        if attention.sinks is not None or mask_NM is not None:
            if self._attention_backend not in MASKED_BACKENDS:
                raise ValueError(
                    f"attention backend {self._attention_backend} takes no mask, which attention_sinks and "
                    "sliding_window need; use set_attention_backend('native')"
                )
            y_BNHI = attention.masked(q, k, v, mask_NM).transpose(1, 2)
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
        y_BHNI = attention(q_BHNI, k_BHLI.to(q_BHNI.dtype), v_BHLI.to(q_BHNI.dtype), mask_BL[:, None, None])
        return self.dropout(self.proj(y_BHNI.transpose(1, 2).flatten(2)))


def _use_attention_layers(module: ModuleType) -> None:
    SelfAttention.__bases__ = (Heads, module.AttentionModuleMixin)


def _use_attention_backends(module: ModuleType) -> None:
    AttentionProcessor.attend = staticmethod(module.dispatch_attention_fn)


when_imported("diffusers.models.attention", _use_attention_layers)
when_imported("diffusers.models.attention_dispatch", _use_attention_backends)
