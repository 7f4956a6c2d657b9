"""How much a recipe computes: matrix products alone, two operations a multiply-add."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import ModelConfig, Recipe
from ..models import make_model
from ..models.block import is_moe_block
from ..models.sizes import blank_inputs


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of one step, over all processes."""

    forward: int
    backward: int
    """Twice the forward pass: for the gradients of inputs and of weights. Frozen weights take less."""
    recompute: int
    """What `training.recompute` makes again."""

    @property
    def model(self) -> int:
        """Forward and backward: what model FLOP/s utilisation counts."""
        return self.forward + self.backward


def compute_of(recipe: Recipe) -> Compute:
    """Count on tensors without memory, as `models.sizes.model_flops` does."""
    config, batch = recipe.model, recipe.training.batch_size
    with torch.device("meta"):
        model = make_model(config).train()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*blank_inputs(config, 1))
    counts, total = counter.get_flop_counts(), counter.get_total_flops()
    again = {"none": 0, "experts": _first_projections(recipe)}
    if recipe.training.recompute == "blocks":
        names = [f"{type(model).__name__}.blocks.{index}" for index in range(config.depth)]
        again["blocks"] = sum(sum(counts[name].values()) for name in names)
    return Compute(batch * total, 2 * batch * total, batch * again[recipe.training.recompute])


def _first_projections(recipe: Recipe) -> int:
    """Of all mixtures, for one image."""
    config = recipe.model
    columns = config.expert_dim * (2 if config.expert_activation == "swiglu" else 1)
    mixtures = sum(is_moe_block(config, index) for index in range(config.depth))
    return round(2 * mixtures * rows_per_image(config) * config.hidden_size * columns)


def rows_per_image(config: ModelConfig) -> float:
    """Pairs of token and expert in a mixture, of one image with all its tokens."""
    tokens = (config.sample_size // config.patch_size) ** 2 + config.class_tokens
    if config.text_dim and config.text_conditioning == "joint":
        tokens += config.text_length
    return tokens * config.experts_per_token
