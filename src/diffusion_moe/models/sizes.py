"""How large a model is, and how much it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import ModelConfig
from ..moe import GroupedExperts
from . import make_model

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
    per_token = config.top_k if config.router in ("tc", "dsmoe") else config.capacity
    return Size(total, total - experts * (1 - per_token / config.num_experts))


def model_flops(config: ModelConfig) -> int:
    """Floating-point operations (two a multiply-add) of matrix products, forward, for one image and one step."""
    with torch.device("meta"):
        model = make_model(config).train()
        x = torch.empty(1, config.in_channels, config.sample_size, config.sample_size)
        labels = torch.zeros(1, dtype=torch.long) if config.num_classes else None
        text = torch.empty(1, config.text_length, config.text_dim) if config.text_dim else None
        pooled = torch.empty(1, config.text_pooled_dim) if config.text_pooled_dim else None
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, torch.zeros(1), labels, text, None, pooled)
    return counter.get_total_flops()
