"""Settings of small models for tests of any of them."""

import dataclasses

from hypothesis import strategies as st

from diffusion_moe.config import ModelConfig
from diffusion_moe.routing_rules import RULES


@st.composite
def model_configs(draw):
    """Settings that change shapes or matmuls, with every routing rule and backbone."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    chosen = {
        "backbone": pick("dit", "jit"),
        "in_channels": pick(1, 3),
        "learn_sigma": pick(True, False),
        "depth": pick(1, 4),
        "num_heads": pick(1, 4),
        "num_kv_heads": pick(None, 1),
        "head_dim": pick(None, 12),
        "qk_norm": pick(True, False),
        "attention_sinks": pick(True, False),
        "norm": pick("layernorm", "rmsnorm"),
        "position": pick("sincos", "rope1d", "rope2d", "sincos+rope2d"),
        "mlp_activation": pick("gelu", "silu", "swiglu"),
        "mlp_bias": pick(True, False),
        "mlp_dim": pick(None, 20),
        "dropout": pick(0.0, 0.1),
        "attention_dropout": pick(0.0, 0.1),
        "num_classes": pick(0, 7),
        "null_class": pick(True, False),
        "router": pick("dense", *(name for name, rule in RULES.items() if rule.has_fixed_rows)),
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
        "last_k_dense": pick(0, 1),
    }
    if pick(True, False):
        chosen |= {"text_dim": 12, "text_length": 5, "text_pooled_dim": pick(0, 6)}
        chosen |= {"text_null": pick("learned", "empty"), "text_conditioning": pick("cross", "joint")}
    if chosen.get("text_conditioning") != "joint":
        chosen["sliding_window"] = pick(0, 3)
    if chosen["backbone"] == "jit":
        chosen |= {"bottleneck_dim": 6, "class_tokens_from": pick(0, chosen["depth"] - 1)}
        chosen["class_tokens"] = pick(0, 3) if chosen["num_classes"] else 0
    if chosen["router"] == "promoe" and "text_dim" not in chosen:  # it needs images without a class
        chosen |= {"num_classes": 7, "null_class": True}
    config = ModelConfig(sample_size=8, hidden_size=32, **chosen)
    if config.moe_blocks and pick(True, False):
        capacities = tuple(pick(0.5, 2.0) for _ in config.moe_blocks)
        config = dataclasses.replace(config, layer_capacities=capacities)
    return config
