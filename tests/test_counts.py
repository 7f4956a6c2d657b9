"""Counts by formula equal those of built models, name by name."""

import pytest
import torch
from activation_trace import blank_inputs
from hypothesis import HealthCheck, given, settings
from model_configs import model_configs
from torch.utils.flop_counter import FlopCounterMode

from diffusion_moe.config import ModelConfig, read_recipe, recipe_names
from diffusion_moe.counts import (
    buffer_bytes,
    buffer_shapes,
    is_expert,
    model_flops,
    model_size,
    parameter_shapes,
)
from diffusion_moe.models import make_model
from diffusion_moe.models.token_drop import TokenDrop
from diffusion_moe.moe import GroupedExperts


def check_counts(config):
    with torch.device("meta"):
        model = make_model(config).train()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*blank_inputs(config, 1))
    parameters = dict(model.named_parameters())
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in parameters.items()}
    assert buffer_shapes(config) == {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    saved = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    assert buffer_shapes(config, persistent=True) == {name: tuple(buffer.shape) for name, buffer in saved.items()}
    assert buffer_bytes(config) == sum(buffer.nbytes for buffer in model.buffers())
    assert buffer_bytes(config, persistent=True) == sum(buffer.nbytes for buffer in saved.values())
    assert all(p.dtype == torch.float32 for p in parameters.values())
    stacks = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    experts = {id(p) for module in stacks for p in module.parameters()}
    assert {id(p) for name, p in parameters.items() if is_expert(name)} == experts
    size, routed = model_size(config), sum(p.numel() for p in parameters.values() if id(p) in experts)
    table = model.pos_embed.numel() if config.adds_sincos else 0
    assert size.total == sum(p.numel() for p in parameters.values()) + table
    assert size.activated == size.total - routed * (1 - config.experts_per_token / config.num_experts)
    flops, counts = model_flops(config), counter.get_flop_counts()
    assert flops.total == counter.get_total_flops()
    names = [f"{type(model).__name__}.blocks.{index}" for index in range(config.depth)]
    assert list(flops.blocks) == [sum(counts[name].values()) for name in names]


DROPPING = [
    {"router": "dsmoe", "fusion": True, "num_kv_heads": 2},
    {"router": "ec", "capacity": 1.5, "expert_bias": True},
    {"router": "dense", "fusion": True, "text_dim": 12, "text_length": 5, "text_conditioning": "joint"},
]


@pytest.mark.parametrize("settings", DROPPING, ids=str)
def test_of_models_whose_middle_blocks_see_a_part_of_the_tokens(settings):
    small = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "num_heads": 4, "depth": 6, "expert_dim": 16}
    config = ModelConfig(**small, **settings)
    check_counts(config)
    with torch.device("meta"):
        model, drop = make_model(config).train(), TokenDrop(torch.zeros(1, 4, dtype=torch.long))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*blank_inputs(config, 1), token_drop=drop)
    assert model_flops(config, 0.75).total == counter.get_total_flops() < model_flops(config).total


FAMILIES = {"dit-s", "tc-dit-l-e16", "diffmoe-s-e16", "dsmoe-s-e16", "jitmoe-b-16-e16", "t2i-dsmoe-s-e16", "shapes-t2i"}
"""A recipe of each family."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAMILIES else pytest.mark.slow) for n in recipe_names()]
)
def test_of_shipped_recipes(name):
    check_counts(read_recipe(name).model)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(model_configs())
def test_of_any_settings(config):
    check_counts(config)
