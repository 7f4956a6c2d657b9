"""How large a model is, and how much it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..config import ModelConfig
from ..models import make_model
from ..moe import GroupedExperts

PAPER_MILLION = 2**20
"""The papers' "M" parameters."""


class Size(NamedTuple):
    """Sizes of one model."""

    total: int
    """Parameters, and the fixed sine-cosine table where there is one, as the published code counts."""
    activated: float
    """The same with only the routed experts that serve a token on average; everything else counts whole."""


def model_size(config: ModelConfig) -> Size:
    """Count without allocating any memory."""
    with torch.device("meta"):
        model = make_model(config)
        experts = sum(
            parameter.numel()
            for module in model.modules()
            if isinstance(module, GroupedExperts)
            for parameter in module.parameters()
        )
        total = sum(parameter.numel() for parameter in model.parameters())
        total += model.pos_embed.numel() if config.adds_sincos else 0
    return Size(total, total - experts * (1 - config.experts_per_token / config.num_experts))


def model_flops(config: ModelConfig) -> int:
    """Floating-point operations (two a multiply-add) of matrix products, forward, for one image and one step."""
    with torch.device("meta"):
        model = make_model(config).train()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*blank_inputs(config, 1))
    return counter.get_total_flops()


def blank_inputs(config: ModelConfig, images: int) -> tuple[Tensor | None, ...]:
    """What `forward` of a backbone takes, in the order of its arguments: zeros; texts of the greatest length."""
    x = torch.zeros(images, config.in_channels, config.sample_size, config.sample_size)
    t = torch.zeros(images, dtype=torch.long if config.process == "ddpm" else torch.float32)
    labels = torch.zeros(images, dtype=torch.long) if config.num_classes else None
    text = torch.zeros(images, config.text_length, config.text_dim) if config.text_dim else None
    pooled = torch.zeros(images, config.text_pooled_dim) if config.text_pooled_dim else None
    return x, t, labels, text, None, pooled
