"""Token dropping: middle blocks that see a part of an image's tokens (SPRINT, TREAD).

Shape suffixes: B images, S tokens of the sequence, K kept tokens of an image, D width, I width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..counts import middle_blocks
from ..nn.position import Rotary


class TokenDrop(NamedTuple):
    """Tokens of a batch that the middle blocks do not see; those of class and text are always seen."""

    kept_BK: Tensor | None = None
    """Ascending indices of the image tokens that the middle blocks see, int64; None: all."""
    path: Tensor | bool = False
    """True for images whose middle blocks are ignored, as if they dropped all tokens, bool, (B,); a plain True: those
    of all images, which are then not computed. The model needs a fusion."""


NOTHING_DROPPED = TokenDrop()


def middle_of(config: ModelConfig, drop: TokenDrop) -> range:
    """The middle blocks; none if all blocks see the same tokens and nothing is fused.

    Raises:
        ValueError: something is dropped that the model cannot lack.
    """
    if drop.path is not False and not config.fusion:
        raise ValueError("token_drop leaves out whole paths, but model.fusion is false; set its path to False")
    if drop.kept_BK is not None:
        config.check_middle_blocks("token_drop keeps a part of the tokens")
    return middle_blocks(config) if config.fusion or drop.kept_BK is not None else range(0)


def keep_tokens(x_BSD: Tensor, kept_BK: Tensor | None, still: int) -> Tensor:
    """The first `still` tokens and the kept ones of the image, (B, still + K, D)."""
    if kept_BK is None:
        return x_BSD
    image_BKD = x_BSD[:, still:].gather(1, kept_BK[..., None].expand(-1, -1, x_BSD.shape[2]))
    return torch.cat((x_BSD[:, :still], image_BKD), dim=1)


def put_back(x_BSD: Tensor, all_BSD: Tensor, kept_BK: Tensor | None, still: int) -> Tensor:
    """All tokens of the sequence: those that `keep_tokens` kept from `x_BSD`, the dropped ones from `all_BSD`."""
    if kept_BK is None:
        return x_BSD
    index_BKD = kept_BK[..., None].expand(-1, -1, x_BSD.shape[2])
    image = all_BSD[:, still:].to(x_BSD.dtype).scatter(1, index_BKD, x_BSD[:, still:])
    return torch.cat((x_BSD[:, :still], image), dim=1)


def keep_rotary(rotary: Rotary | None, kept_BK: Tensor | None, still: int) -> Rotary | None:
    """Rotation angles of the tokens that `keep_tokens` keeps, (B, 1, still + K, I)."""
    if rotary is None or kept_BK is None:
        return rotary

    def keep(table_SI: Tensor) -> Tensor:
        still_BSI = table_SI[:still].expand(len(kept_BK), -1, -1)
        return torch.cat((still_BSI, table_SI[still:][kept_BK]), dim=1)[:, None]

    return rotary._replace(cos_NI=keep(rotary.cos_NI), sin_NI=keep(rotary.sin_NI))


class Fusion(nn.Module):
    """Fusion of the tokens before and after the middle blocks (SPRINT, arXiv 2510.21986).

    Dropped tokens are a mask token after the middle blocks; a linear layer projects both tokens of a position to one.
    Facts of the published code: the tokens after the middle blocks come first, the linear layer has a bias and is
    Xavier-uniform, the mask token is normal 0.02. There the mask token keeps its first value, although it is called
    learnable; here it learns. The published models have no tokens of class or text in the sequence; here these are
    fused like those of the image.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.linear = nn.Linear(2 * dim, dim)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, deep_BSD: Tensor, shallow_BSD: Tensor, drop: TokenDrop, still: int) -> Tensor:
        """Fuse the tokens after the middle blocks, which may be a part of all, with all before them, (B, S, D)."""
        mask_BSD = self.mask_token.to(shallow_BSD.dtype).expand_as(shallow_BSD)
        if drop.path is True:
            deep_BSD = mask_BSD
        else:
            deep_BSD = put_back(deep_BSD, mask_BSD, drop.kept_BK, still)
        if isinstance(drop.path, Tensor):
            deep_BSD = torch.where(drop.path[:, None, None], mask_BSD, deep_BSD)
        return self.linear(torch.cat((deep_BSD, shallow_BSD), dim=-1))
