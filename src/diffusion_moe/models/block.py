"""The transformer block of every backbone. Shape suffixes: B images, N tokens of one image, D width."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from ..counts import in_middle_half, is_moe_block
from ..moe import FeedForward, MoEFeedForward, MoEOutput, RouterConfig, RoutingContext, RoutingReport
from ..nn.attention import CrossAttention, SelfAttention
from ..nn.norm import make_norm, modulate
from ..nn.position import Rotary
from .text import TextTokens


class BlockOutput(NamedTuple):
    """Output of a block."""

    hidden_states: Tensor
    report: RoutingReport | None
    """Report of the router; None for a dense block."""


class DiTBlock(nn.Module):
    """Attention and a feed-forward layer, dense or MoE, both modulated by adaLN-Zero (DiT section 3.2)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        D = config.hidden_size
        dropout, attention_dropout = config.dropout, config.attention_dropout
        if not in_middle_half(config, index):
            dropout = attention_dropout = 0.0
        self.norm1, self.norm2 = make_norm(config.norm, D), make_norm(config.norm, D)
        self.attn = SelfAttention(
            D,
            config.num_heads,
            config.num_kv_heads,
            config.qk_norm,
            config.head_dim,
            config.attention_sinks,
            dropout,
            attention_dropout,
        )
        self.mlp: nn.Module
        if is_moe_block(config, index):
            self.mlp = make_moe(config.of_moe_block(index))
        else:
            self.mlp = FeedForward(D, config.mlp_width, config.mlp_activation, config.mlp_bias, dropout)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.cross_norm: nn.Module | None = None
        self.cross_attn: CrossAttention | None = None
        if config.text_dim and config.text_conditioning == "cross":
            self.cross_norm = make_norm(config.norm, D)
            self.cross_attn = CrossAttention(
                D, config.num_heads, config.num_kv_heads, config.qk_norm, config.head_dim, dropout
            )

    def forward(
        self,
        x_BND: Tensor,
        condition_BD: Tensor,
        rotary: Rotary | None,
        mask_NM: Tensor | None = None,
        text: TextTokens | None = None,
        context: RoutingContext | None = None,
    ) -> BlockOutput:
        """Apply the block.

        Args:
            x_BND: tokens.
            condition_BD: time, class and pooled text.
            rotary: rotary positions; None without them.
            mask_NM: true where a token attends to a key, bool; None: everywhere.
            text: text for cross-attention; None without it.
            context: further inputs of the router, see `RoutingContext`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition_BD).chunk(6, dim=-1)
        x_BND = x_BND + gate1[:, None] * self.attn(modulate(self.norm1(x_BND), shift1, scale1), rotary, mask_NM)
        if self.cross_attn is not None and self.cross_norm is not None and text is not None:
            # PixArt-alpha section 2.3: after self-attention, not modulated by adaLN; its projection starts at zero.
            x_BND = x_BND + self.cross_attn(self.cross_norm(x_BND), *text)
        normed_BND = self.norm2(x_BND)
        modulated_BND = modulate(normed_BND, shift2, scale2)
        if isinstance(self.mlp, MoEFeedForward):
            out = self.mlp(modulated_BND, normed_BND if self.mlp.router.sees_unmodulated else None, context)
        else:
            out = self.mlp(modulated_BND)  # a dense layer, or another library's experts in its place
        y_BND, report = out if isinstance(out, MoEOutput) else (out, None)
        return BlockOutput(x_BND + gate2[:, None] * y_BND, report)


def checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
    """Apply a block, store only its inputs, and recompute it in the backward pass."""
    return checkpoint(block.__call__, *inputs, use_reentrant=False)


class FinalLayer(nn.Module):
    """Modulated norm and projection to the values of a patch."""

    def __init__(self, dim: int, out_features: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(dim, out_features)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale = self.adaln(condition_BD).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x_BND), shift, scale))


def make_moe(config: ModelConfig) -> MoEFeedForward:
    """The MoE layer of a configuration."""
    settings = {field.name: getattr(config, field.name) for field in fields(RouterConfig) if field.name != "kind"}
    return MoEFeedForward(
        dim=config.hidden_size,
        expert_dim=config.expert_dim,
        router=RouterConfig(config.router, **settings),
        activation=config.expert_activation,
        bias=config.expert_bias,
        shared=config.shared,
        shared_dim=config.shared_dim,
        shared_bias=config.shared_bias,
        dropout=config.expert_dropout,
    )
