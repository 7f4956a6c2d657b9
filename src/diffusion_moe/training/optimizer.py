"""AdamW and its learning-rate schedule, a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on linear and expert matrices only."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices |= {id(p) for name, p in model.named_parameters() if name.endswith((".w_in", ".w_out"))}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step number `step` (from 1) of `steps`: linear warm-up, then constant or half a cosine to 0."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
