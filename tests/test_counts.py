"""Counts by formula equal those of built models, name by name."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
from diffusion_moe.moe import GroupedExperts
from diffusion_moe.planning.activations import blank_inputs


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


@pytest.mark.parametrize("name", recipe_names())
def test_of_shipped_recipes(name):
    check_counts(read_recipe(name).model)


@st.composite
def configs(draw):
    """Settings that change shapes or matmuls, with every routing rule and backbone."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    chosen = {
        "backbone": pick("dit", "jit"),
        "in_channels": pick(1, 3),
        "learn_sigma": pick(True, False),
        "depth": pick(1, 4),
        "num_kv_heads": pick(None, 2, 1),
        "head_dim": pick(None, 12),
        "qk_norm": pick(True, False),
        "attention_sinks": pick(True, False),
        "norm": pick("layernorm", "rmsnorm"),
        "position": pick("sincos", "rope1d", "rope2d", "sincos+rope2d"),
        "mlp_activation": pick("gelu", "silu", "swiglu"),
        "mlp_bias": pick(True, False),
        "mlp_dim": pick(None, 20),
        "dropout": pick(0.0, 0.1),
        "num_classes": pick(0, 7),
        "null_class": pick(True, False),
        "router": pick("dense", "tc", "ec", "diffmoe", "dsmoe"),
        "num_experts": pick(4, 8),
        "expert_dim": pick(16, 24),
        "expert_activation": pick("gelu", "swiglu"),
        "expert_bias": pick(True, False),
        "expert_dropout": pick(0.0, 0.1),
        "top_k": pick(1, 3),
        "capacity": pick(0.1, 1.0, 1.3),
        "shared": pick("none", "identity", "gelu", "swiglu"),
        "shared_dim": pick(None, 20),
        "shared_bias": pick(True, False),
        "balance": pick("none", "aux", "bias"),
        "moe_layer_freq": pick(1, 2),
        "first_k_dense": pick(0, 2),
    }
    if pick(True, False):
        chosen |= {"text_dim": 12, "text_length": 5, "text_pooled_dim": pick(0, 6)}
        chosen |= {"text_null": pick("learned", "empty"), "text_conditioning": pick("cross", "joint")}
    if chosen.get("text_conditioning") != "joint":
        chosen["sliding_window"] = pick(0, 3)
    if chosen["backbone"] == "jit":
        chosen |= {"bottleneck_dim": 6, "class_tokens_from": pick(0, chosen["depth"] - 1)}
        chosen["class_tokens"] = pick(0, 3) if chosen["num_classes"] else 0
    return ModelConfig(sample_size=8, hidden_size=32, num_heads=4, **chosen)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_of_any_settings(config):
    check_counts(config)
