"""Constructor arguments of the reference code as ours, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..config import ModelConfig, Process, names_where, unread_by

Settings = dict[str, Any]

OUR_NAMES = {
    "input_size": "sample_size",
    "in_context_len": "class_tokens",
    "in_context_start": "class_tokens_from",
    "proj_drop": "dropout",
    "attn_drop": "attention_dropout",
    "moe_intermediate_size": "expert_dim",
    "num_experts_per_tok": "top_k",
}
"""Our fields by the reference names of arguments with equal values, where the names differ."""
ROPE = {"none": "sincos", "1d": "rope1d", "2d": "rope2d"}

# Defaults of the reference constructors; every key they know and that shapes the model.
DIT = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "num_classes": 1000,
    "learn_sigma": True,
    "head_dim": None,
}
LATENT = DIT | {"class_dropout_prob": 0.1, "use_swiglu": False}
JIT = {
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
}
SINKS = {"use_sinks": False, "sliding_window": 0}
PARAMS: dict[str, Settings] = {
    **dict.fromkeys(("dense", "tc", "ec"), LATENT),
    "diffmoe": LATENT | {"CapacityPred_loss_weight": 0.01},
    "dsmoe": LATENT | SINKS | {"rope_type": "none", "enable_gqa": False, "norm_type": "layernorm"},
    "jit": JIT,
}
REQUIRED: Any = object()
POOLED = {"num_experts": REQUIRED, "capacity": REQUIRED, "n_shared_experts": 0, "interleave": True}
GROUPED = dict.fromkeys(
    ("num_experts", "n_group", "topk_group", "routed_scaling_factor", "moe_intermediate_size", "num_experts_per_tok"),
    REQUIRED,
)
SHARED = {"use_shared_expert": REQUIRED, "interleave": True, "skip_first2": False}
MOE: dict[str, Settings] = {
    "dense": {},
    "tc": POOLED | {"n_shared_experts": None},
    "ec": POOLED,
    "diffmoe": POOLED,
    "dsmoe": GROUPED | SHARED,
    "jit": GROUPED | SHARED | {"proj_drop": 0.0},
}

# Keys of reference files that do not change the model.
IDLE_PARAMS = {"init_MoeMLP", "use_capacity_schedule", "CapacityPred_loss_weight", "use_flash_attn", "pretraining_tp"}
IDLE_MOE = {"hidden_size", "init_MoeMLP", "capacity", "skip_last2", "capacity_schedule"}


def read_settings(
    kind: str, params: Mapping[str, Any], moe: Mapping[str, Any] | None, process: Process = "flow"
) -> Settings:
    """Fields of `ModelConfig` for a model of the reference code.

    Args:
        kind: "dense", "tc", "ec", "diffmoe", "dsmoe" or "jit".
        params: arguments of the reference constructor.
        moe: its MoE_config.
        process: process it was trained for, which is no argument of the constructor.

    Raises:
        ValueError: a key is missing or unknown, or has a value that the reference code does not take.
    """
    p = _complete(params, PARAMS[kind], IDLE_PARAMS, "the model's params")
    if kind == "jit":
        return _jit(p, moe)
    settings = _ours(DIT, p) | {
        "backbone": "dit",
        "process": process,
        "prediction": "velocity" if process == "flow" else "epsilon",
        "null_class": p["class_dropout_prob"] > 0,
        "position": "sincos",
        "mlp_activation": "swiglu" if p["use_swiglu"] else "gelu",
        "mlp_bias": not p["use_swiglu"],
    }
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


def _ours(names: Iterable[str], values: Settings) -> Settings:
    return {OUR_NAMES.get(name, name): values[name] for name in names}


def _theirs(names: Iterable[str], config: ModelConfig) -> Settings:
    return {name: getattr(config, OUR_NAMES.get(name, name)) for name in names}


def _pooled(kind: str, p: Settings, m: Settings) -> Settings:
    """Settings of TC-DiT, EC-DiT and DiffMoE."""
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
        settings["capacity"] = m["capacity"]
    if kind == "diffmoe":
        settings["capacity_loss_weight"] = p["CapacityPred_loss_weight"]
        if shared:  # one shared expert of width 8 D, whatever the count
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
        **_ours(GROUPED, m),
        "router": "dsmoe",
        "expert_activation": "swiglu",
        "shared": "swiglu" if m["use_shared_expert"] else "identity",
    }


def _jit(p: Settings, moe: Mapping[str, Any] | None) -> Settings:
    settings = {
        "backbone": "jit",
        "prediction": "x",
        **_ours(JIT, p),
        "class_tokens_from": p["in_context_start"] if p["in_context_len"] else 0,
        "qk_norm": True,
        "norm": "rmsnorm",
        "position": "sincos+rope2d",
        "rotary_pairs": "neighbours",
        "mlp_dim": int(int(p["hidden_size"] * p["mlp_ratio"]) * 2 / 3),
        "mlp_activation": "swiglu",
        "mlp_bias": True,
        "router": "dense",
    }
    if moe is None:
        return settings
    m = _complete(moe, MOE["jit"], IDLE_MOE, "moe_config")
    if not m["interleave"]:  # the reference code then makes every layer dense
        return settings
    return settings | _grouped(m) | {"expert_bias": True, "shared_bias": True, "expert_dropout": m["proj_drop"]}


def write_settings(kind: str, config: ModelConfig) -> tuple[Settings, Settings | None]:
    """The reference constructor's arguments for one of our models: params and MoE_config.

    Raises:
        ValueError: the reference code has no such model; the message names the settings that differ.
    """
    p, m = _theirs(JIT if kind == "jit" else DIT, config), None
    if kind != "jit":
        p["class_dropout_prob"] = 0.1 if config.null_class else 0.0
        p["use_swiglu"] = config.mlp_activation == "swiglu"
    elif config.router == "dsmoe":
        m = _dsmoe_moe(config) | {"proj_drop": config.expert_dropout}
    if kind in ("tc", "ec", "diffmoe"):
        m = _pooled_moe(kind, config)
    if kind == "diffmoe":
        p["CapacityPred_loss_weight"] = config.capacity_loss_weight
    if kind == "dsmoe":
        p |= {
            "rope_type": {ours: theirs for theirs, ours in ROPE.items()}.get(config.position),
            "norm_type": config.norm,
            "use_sinks": config.attention_sinks,
            "sliding_window": config.sliding_window,
            "enable_gqa": bool(config.num_kv_heads),
        }
        m = _dsmoe_moe(config) | {"capacity": 1, "skip_last2": False}
    check_writable(kind, config, ModelConfig(**read_settings(kind, p, m, config.process)))
    return p, m


def _dsmoe_moe(config: ModelConfig) -> Settings:
    return _theirs(GROUPED, config) | {
        "hidden_size": config.hidden_size,
        "use_shared_expert": config.shared == "swiglu",
        "interleave": config.moe_layer_freq == 2,
        "init_MoeMLP": False,
        "skip_first2": config.first_k_dense or False,
    }


def _pooled_moe(kind: str, config: ModelConfig) -> Settings:
    shared = 0 if config.shared == "none" else (config.shared_dim or config.expert_dim) // config.hidden_size
    return {
        "num_experts": config.num_experts,
        "capacity": config.top_k if kind == "tc" else config.capacity,
        "n_shared_experts": shared or (None if kind == "tc" else 0),
        "interleave": config.moe_layer_freq == 2,
        "init_MoeMLP": False,
    }


def check_writable(kind: str, config: ModelConfig, again: ModelConfig) -> None:
    """Refuse a model that the reference code lacks, so that reading gives the settings of another one, `again`."""
    # The reference code may lack what only our training or inference reads.
    free = names_where(ModelConfig, reference=False) | unread_by(config.router)
    ours, theirs = _effective(config), _effective(again)
    differ = [name for name in ours if name not in free and ours[name] != theirs[name]]
    if differ:
        values = ", ".join(f"{name} {ours[name]!r}" for name in differ)
        raise ValueError(f"the reference {kind} code has no model with {values}")


def _effective(config: ModelConfig) -> Settings:
    """All settings, where one is null the value that replaces it, and where one is not read None."""
    values = vars(config) | {"mlp_dim": config.mlp_width, "mlp_ratio": None, "head_dim": config.head_width}
    if config.shared in ("gelu", "swiglu"):
        return values | {"shared_dim": config.shared_dim or config.expert_dim}
    return values | {"shared_dim": None, "shared_bias": None}
