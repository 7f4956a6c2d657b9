"""Constructor arguments of the reference code as ours, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig, Process, names_where, unread_by

Settings = dict[str, Any]

# Defaults of the reference constructors; every key they know and that shapes the model.
LATENT = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "use_swiglu": False,
    "head_dim": None,
}
PARAMS: dict[str, Settings] = {
    "dense": LATENT,
    "tc": LATENT,
    "ec": LATENT,
    "diffmoe": LATENT | {"CapacityPred_loss_weight": 0.01},
    "dsmoe": LATENT
    | {
        "rope_type": "none",
        "use_sinks": False,
        "sliding_window": 0,
        "enable_gqa": False,
        "norm_type": "layernorm",
    },
    "jit": {
        "input_size": 256,
        "patch_size": 16,
        "in_channels": 3,
        "hidden_size": 1024,
        "depth": 24,
        "num_heads": 16,
        "mlp_ratio": 4.0,
        "attn_drop": 0.0,
        "proj_drop": 0.0,
        "num_classes": 1000,
        "bottleneck_dim": 128,
        "in_context_len": 32,
        "in_context_start": 8,
    },
}
REQUIRED: Any = object()
POOLED = {"num_experts": REQUIRED, "capacity": REQUIRED, "n_shared_experts": 0, "interleave": True}
MOE: dict[str, Settings] = {
    "dense": {},
    "tc": POOLED | {"n_shared_experts": None},
    "ec": POOLED,
    "diffmoe": POOLED,
    "dsmoe": {
        "num_experts": REQUIRED,
        "moe_intermediate_size": REQUIRED,
        "n_group": REQUIRED,
        "topk_group": REQUIRED,
        "num_experts_per_tok": REQUIRED,
        "routed_scaling_factor": REQUIRED,
        "use_shared_expert": REQUIRED,
        "interleave": True,
        "skip_first2": False,
    },
}
MOE["jit"] = MOE["dsmoe"] | {"proj_drop": 0.0}

# Keys of reference files that leave the model as it is.
IDLE_PARAMS = {"init_MoeMLP", "use_capacity_schedule", "CapacityPred_loss_weight", "use_flash_attn", "pretraining_tp"}
IDLE_MOE = {"hidden_size", "init_MoeMLP", "capacity", "skip_last2", "capacity_schedule"}

ROPE = {"none": "sincos", "1d": "rope1d", "2d": "rope2d"}


def read_settings(
    kind: str, params: Mapping[str, Any], moe: Mapping[str, Any] | None, process: Process = "flow"
) -> Settings:
    """Fields of `ModelConfig` for a model of the reference code.

    Args:
        kind: "dense", "tc", "ec", "diffmoe", "dsmoe" or "jit". params: arguments of the reference constructor.
        moe: its MoE_config. process: what it was trained for, which the constructor does not know.

    Raises:
        ValueError: a key is missing or unknown, or has a value that the reference code does not take.
    """
    p = _complete(params, PARAMS[kind], IDLE_PARAMS, "the model's params")
    if kind == "jit":
        return _jit(p, moe)
    settings = _latent(p) | {"process": process, "prediction": "velocity" if process == "flow" else "epsilon"}
    if kind == "dense":
        return settings | {"router": "dense"}
    m = _complete(moe or {}, MOE[kind], IDLE_MOE, "MoE_config")
    settings |= {"num_experts": m["num_experts"], "moe_layer_freq": 2 if m["interleave"] else 1}
    return settings | (_dsmoe(p, m) if kind == "dsmoe" else _pooled(kind, p, m))


def _complete(given: Mapping[str, Any], known: Settings, idle: set[str], where: str) -> Settings:
    unknown = sorted(given.keys() - known.keys() - idle)
    missing = sorted(name for name, default in known.items() if default is REQUIRED and name not in given)
    if unknown or missing:
        parts = [f"lack {', '.join(missing)}"] * bool(missing) + [f"have unknown {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(f"{where} {' and '.join(parts)}")
    return {name: given.get(name, default) for name, default in known.items()}


def _latent(p: Settings) -> Settings:
    swiglu = bool(p["use_swiglu"])
    return {
        "backbone": "dit",
        "sample_size": p["input_size"],
        **{name: p[name] for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads")},
        "head_dim": p["head_dim"],
        "num_classes": p["num_classes"],
        "null_class": p["class_dropout_prob"] > 0,
        "learn_sigma": p["learn_sigma"],
        "position": "sincos",
        "mlp_ratio": p["mlp_ratio"],
        "mlp_activation": "swiglu" if swiglu else "gelu",
        "mlp_bias": not swiglu,
    }


def _pooled(kind: str, p: Settings, m: Settings) -> Settings:
    """TC-DiT, EC-DiT and DiffMoE."""
    swiglu, shared = bool(p["use_swiglu"]), m["n_shared_experts"] or 0
    settings = {
        "router": kind,
        "expert_dim": int(p["hidden_size"] * p["mlp_ratio"]),
        "expert_activation": "swiglu" if swiglu else "gelu",
        "expert_bias": not swiglu,
        "shared": "none",
    }
    if kind == "tc":
        settings |= {"top_k": m["capacity"], "balance": "aux", "balance_weight": 0.01}
    else:
        settings |= {"capacity": m["capacity"]}
    if kind == "diffmoe":
        settings |= {"capacity_loss_weight": p["CapacityPred_loss_weight"]}
        if shared:  # one of eight widths, whatever the count
            settings |= {"shared": "gelu", "shared_dim": 8 * p["hidden_size"], "shared_bias": True}
    elif shared:
        settings |= {"shared": "swiglu", "shared_dim": shared * p["hidden_size"], "shared_bias": False}
    return settings


def _dsmoe(p: Settings, m: Settings) -> Settings:
    if p["rope_type"] not in ROPE:
        raise ValueError(f"the model's rope_type is {p['rope_type']!r}; the reference code has {', '.join(ROPE)}")
    return {
        **_grouped(m),
        "expert_bias": False,
        "shared_bias": False,
        "position": ROPE[p["rope_type"]],
        "num_kv_heads": p["num_heads"] // 2 if p["enable_gqa"] else None,
        "attention_sinks": p["use_sinks"],
        "sliding_window": p["sliding_window"] if p["use_sinks"] else 0,  # read with sinks only
        "norm": "rmsnorm" if p["norm_type"] == "rmsnorm" else "layernorm",
        "mlp_activation": "silu",  # the reference dense layers, whatever use_swiglu says
        "mlp_bias": True,
        "first_k_dense": 2 if m["skip_first2"] is True else int(m["skip_first2"]),
    }


def _grouped(m: Settings) -> Settings:
    return {
        "router": "dsmoe",
        "expert_dim": m["moe_intermediate_size"],
        "expert_activation": "swiglu",
        "top_k": m["num_experts_per_tok"],
        "n_group": m["n_group"],
        "topk_group": m["topk_group"],
        "routed_scaling_factor": m["routed_scaling_factor"],
        "shared": "swiglu" if m["use_shared_expert"] else "identity",
    }


def _jit(p: Settings, moe: Mapping[str, Any] | None) -> Settings:
    settings = {
        "backbone": "jit",
        "prediction": "x",
        "sample_size": p["input_size"],
        **{name: p[name] for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")},
        "bottleneck_dim": p["bottleneck_dim"],
        "class_tokens": p["in_context_len"],
        "class_tokens_from": p["in_context_start"] if p["in_context_len"] else 0,
        "qk_norm": True,
        "norm": "rmsnorm",
        "position": "sincos+rope2d",
        "rotary_pairs": "neighbours",
        "mlp_ratio": p["mlp_ratio"],
        "mlp_dim": int(int(p["hidden_size"] * p["mlp_ratio"]) * 2 / 3),
        "mlp_activation": "swiglu",
        "mlp_bias": True,
        "dropout": p["proj_drop"],
        "attention_dropout": p["attn_drop"],
        "router": "dense",
    }
    if moe is None:
        return settings
    m = _complete(moe, MOE["jit"], IDLE_MOE, "moe_config")
    if not m["interleave"]:  # the reference code then makes every layer dense
        return settings
    return settings | {
        **_grouped(m),
        "num_experts": m["num_experts"],
        "expert_bias": True,
        "shared_bias": True,
        "expert_dropout": m["proj_drop"],
    }


def write_settings(kind: str, config: ModelConfig) -> tuple[Settings, Settings | None]:
    """The reference constructor's arguments for one of our models: params and MoE_config.

    Raises:
        ValueError: the reference code has no such model; the message names the settings that differ.
    """
    c = config
    p: Settings = {"input_size": c.sample_size, "num_classes": c.num_classes}
    p |= {name: getattr(c, name) for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads")}
    p["mlp_ratio"] = c.mlp_ratio
    if kind == "jit":
        p |= {"bottleneck_dim": c.bottleneck_dim, "in_context_len": c.class_tokens}
        p |= {"in_context_start": c.class_tokens_from, "proj_drop": c.dropout, "attn_drop": c.attention_dropout}
    else:
        p |= {"learn_sigma": c.learn_sigma, "class_dropout_prob": 0.1 if c.null_class else 0.0, "head_dim": c.head_dim}
        p["use_swiglu"] = c.mlp_activation == "swiglu"
    m: Settings | None = None
    if kind == "dsmoe":
        p |= {"rope_type": {ours: theirs for theirs, ours in ROPE.items()}.get(c.position), "norm_type": c.norm}
        p |= {"use_sinks": c.attention_sinks, "sliding_window": c.sliding_window, "enable_gqa": bool(c.num_kv_heads)}
    elif kind == "diffmoe":
        p["CapacityPred_loss_weight"] = c.capacity_loss_weight
    if kind == "dsmoe" or (kind == "jit" and c.router == "dsmoe"):
        m = {"num_experts": c.num_experts, "hidden_size": c.hidden_size, "moe_intermediate_size": c.expert_dim}
        m |= {"n_group": c.n_group, "topk_group": c.topk_group, "num_experts_per_tok": c.top_k}
        m |= {"routed_scaling_factor": c.routed_scaling_factor, "use_shared_expert": c.shared == "swiglu"}
        m |= {"interleave": c.moe_layer_freq == 2, "init_MoeMLP": False, "skip_first2": c.first_k_dense or False}
        m |= {"proj_drop": c.expert_dropout} if kind == "jit" else {"capacity": 1, "skip_last2": False}
    elif kind != "dense" and kind != "jit":
        shared = 0 if c.shared == "none" else (c.shared_dim or c.expert_dim) // c.hidden_size
        m = {"num_experts": c.num_experts, "capacity": c.top_k if kind == "tc" else c.capacity}
        m |= {"n_shared_experts": shared or (None if kind == "tc" else 0), "interleave": c.moe_layer_freq == 2}
        m |= {"init_MoeMLP": False}
    check_writable(kind, config, ModelConfig(**read_settings(kind, p, m, config.process)))
    return p, m


# What only our training or inference reads, so that the reference code may lack it.
FREE = {
    "inference_pool",
    "threshold_decay",
    "balance",
    "balance_weight",
    "balance_rate",
    "capacity_loss_weight",
    "min_gap",
    "noise_scale",
}
UNREAD = {
    "dense": {"num_experts", "expert_dim", "expert_activation", "expert_bias", "shared", "shared_dim", "shared_bias"}
    | {
        "top_k",
        "capacity",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "moe_layer_freq",
        "first_k_dense",
        "expert_dropout",
    },
    "tc": {"capacity", "n_group", "topk_group", "routed_scaling_factor"},
    "ec": {"top_k", "n_group", "topk_group", "routed_scaling_factor"},
    "diffmoe": {"top_k", "n_group", "topk_group", "routed_scaling_factor"},
    "dsmoe": {"capacity"},
}
"""Settings that a routing rule does not read."""


def check_writable(kind: str, config: ModelConfig, again: ModelConfig) -> None:
    """Refuse a model that would be read again as another.

    Args:
        again: what reading gives.

    Raises:
        ValueError: names the settings that differ.
    """
    # The published code may lack what only our training or inference reads.
    free = names_where(ModelConfig, reference=False) | unread_by(config.router)
    names = [name for name in vars(config) if name not in free]
    differ = [name for name in names if _effective(config, name) != _effective(again, name)]
    if differ:
        values = ", ".join(f"{name} {_effective(config, name)!r}" for name in differ)
        raise ValueError(f"the reference {kind} code has no model with {values}")


def _effective(config: ModelConfig, name: str) -> Any:
    """The value a setting comes to, where null stands for another's."""
    value = getattr(config, name)
    if name == "mlp_dim":
        return config.mlp_width
    if name == "mlp_ratio":
        return None  # mlp_dim says it
    if name == "head_dim":
        return config.head_width
    if name == "shared_dim":
        return (value or config.expert_dim) if config.shared in ("gelu", "swiglu") else None
    if name == "shared_bias":
        return value if config.shared in ("gelu", "swiglu") else None
    return value
