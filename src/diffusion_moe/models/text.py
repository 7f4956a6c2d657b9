"""Embedding of a text encoder's features, for cross-attention and for adaLN.

Shape suffixes: B images, L tokens of a text, W width of the encoder's features, P width of its pooled one, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..nn.norm import EPS


class TextTokens(NamedTuple):
    """Tokens of a text for the blocks."""

    tokens: Tensor
    """(B, L, D)."""
    mask: Tensor
    """True at tokens, bool, (B, L); at least one in each text."""


class EmbeddedText(NamedTuple):
    """Output of `TextEmbedder`."""

    text: TextTokens
    pooled: Tensor
    """Vector added to the time embedding for adaLN, (B, D)."""


class TextEmbedder(nn.Module):
    """Projection of text features to tokens of the model's width, and to one vector per text for adaLN.

    A text without a token is no prompt and is replaced by the null prompt: a learned sequence, or (text_null: empty)
    buffers that `set_null` fills with the features of the empty prompt. In one sequence with the image
    (text_conditioning: joint) the null prompt also fills the positions after a prompt, which are attended to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, W, L, P = config.hidden_size, config.text_dim, config.text_length, config.text_pooled_dim
        self.config = config
        self.norm = nn.LayerNorm(W, elementwise_affine=False, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(W, D), nn.GELU(approximate="tanh"), nn.Linear(D, D))
        self.pool = nn.Sequential(nn.Linear(P or W, D), nn.SiLU(), nn.Linear(D, D))
        self.null_text: Tensor
        self.null_pooled: Tensor
        self.null_mask: Tensor
        if config.text_null == "learned":
            self.null_text = nn.Parameter(torch.empty(L, W))
            if P:
                self.null_pooled = nn.Parameter(torch.empty(P))
        else:
            self.register_buffer("null_text", torch.zeros(L, W))
            if P:
                self.register_buffer("null_pooled", torch.zeros(P))
        self.register_buffer("null_mask", torch.ones(L, dtype=torch.bool))
        self.reset_null()

    def reset_null(self) -> None:
        """Initialise the learned null prompt; one set by `set_null` is kept."""
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter)

    @torch.no_grad()
    def set_null(self, features_LW: Tensor, pooled_P: Tensor | None) -> None:
        """Set the null prompt to the features of the empty prompt (text_null: empty).

        Raises:
            ValueError: no tokens, more than text_length, or features of another width than the model's.
        """
        config, (L, W) = self.config, features_LW.shape
        if config.text_dim != W or L not in range(1, config.text_length + 1):
            raise ValueError(
                f"the empty prompt has {L} tokens of width {W}, but model.text_length is {config.text_length} and "
                f"model.text_dim {config.text_dim}; it needs at least one token, and the model's width"
            )
        self.null_text.zero_()
        self.null_text[:L] = features_LW
        self.null_mask.copy_(torch.arange(config.text_length, device=self.null_mask.device) < L)
        if config.text_pooled_dim:
            if pooled_P is None or pooled_P.shape != self.null_pooled.shape:
                raise ValueError(f"the empty prompt has no pooled feature of width {config.text_pooled_dim}")
            self.null_pooled.copy_(pooled_P)

    def forward(self, features_BLW: Tensor, mask_BL: Tensor | None, pooled_BP: Tensor | None) -> EmbeddedText:
        """Embed texts of up to `text_length` tokens.

        Args:
            features_BLW: features of the text encoder.
            mask_BL: true (or not 0) at tokens; None: everywhere.
            pooled_BP: pooled features; None for a model without them.

        Raises:
            ValueError: shapes that do not fit the model, or a pooled feature that is missing or not supported.
        """
        mask_BL = self._checked(features_BLW, mask_BL, pooled_BP)
        dtype, room = self.null_text.dtype, self.config.text_length - features_BLW.shape[1]
        features_BLW = F.pad(features_BLW.to(dtype), (0, 0, 0, room))
        mask_BL = F.pad(mask_BL, (0, room))
        missing_B = ~mask_BL.any(dim=1)
        if self.config.text_conditioning == "joint":
            filled_BL, mean_BL = ~mask_BL, mask_BL
            mask_BL = torch.ones_like(mask_BL)
        else:
            filled_BL, mean_BL = missing_B[:, None].expand_as(mask_BL), mask_BL
            mask_BL = torch.where(missing_B[:, None], self.null_mask, mask_BL)
        x_BLW = self.norm(torch.where(filled_BL[..., None], self.null_text, features_BLW))
        if pooled_BP is None:
            mean_BL = torch.where(missing_B[:, None], self.null_mask, mean_BL).to(x_BLW.dtype)[..., None]
            pooled = (x_BLW * mean_BL).sum(dim=1) / mean_BL.sum(dim=1)
        else:
            pooled = torch.where(missing_B[:, None], self.null_pooled, pooled_BP.to(dtype))
        return EmbeddedText(TextTokens(self.mlp(x_BLW), mask_BL), self.pool(pooled))

    def _checked(self, features_BLW: Tensor, mask_BL: Tensor | None, pooled_BP: Tensor | None) -> Tensor:
        """Check the inputs and return the mask, bool."""
        config, (B, L, W) = self.config, features_BLW.shape
        if config.text_dim != W or config.text_length < L:
            raise ValueError(
                f"encoder_hidden_states have {L} tokens of width {W}, but the model takes up to "
                f"{config.text_length} of width {config.text_dim}; use the text encoder it was trained with, and cut "
                "prompts to its length"
            )
        if (pooled_BP is not None) != bool(config.text_pooled_dim):
            raise ValueError(
                f"pooled_projections are {'missing' if pooled_BP is None else 'given'}, but model.text_pooled_dim is "
                f"{config.text_pooled_dim}; pass them exactly when it is not 0"
            )
        if mask_BL is None:
            return torch.ones(B, L, dtype=torch.bool, device=features_BLW.device)
        if mask_BL.shape != (B, L):
            raise ValueError(f"encoder_attention_mask has shape {tuple(mask_BL.shape)}; the features need {(B, L)}")
        return mask_BL.bool()
