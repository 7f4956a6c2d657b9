"""The reference formats as tables of names. {n} is a block's number, {e} an expert's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from ..config import ModelConfig
from ..counts import is_moe_block
from .layout import Form, Layout, Row

Format = Literal["dense", "tc", "ec", "diffmoe", "dsmoe", "jit", "dit", "sit", "dit-moe"]

FORMATS: dict[str, str] = {
    "dense": "the dense baseline of DiffMoE's and DSMoE's code",
    "tc": "its token-choice baseline",
    "ec": "its expert-choice baseline",
    "diffmoe": "DiffMoE",
    "dsmoe": "DSMoE",
    "jit": "JiT and JiTMoE",
    "dit": "facebookresearch/DiT",
    "sit": "willisma/SiT",
    "dit-moe": "feizc/DiT-MoE",
}
"""Description of each format."""

Table = dict[str, str | tuple[str, ...]]
"""Reference names by our names; several for a tensor that is joined from parts."""


def _both(ours: str, theirs: str) -> Table:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


ENDS: Table = {
    "y_embedder.weight": "y_embedder.embedding_table.weight",
    **_both("t_embedder.mlp.0", "t_embedder.mlp.0"),
    **_both("t_embedder.mlp.2", "t_embedder.mlp.2"),
    **_both("final_layer.linear", "final_layer.linear"),
    **_both("final_layer.adaln.1", "final_layer.adaLN_modulation.1"),
}
BLOCK: Table = {**_both("attn.proj", "attn.proj"), **_both("adaln.1", "adaLN_modulation.1")}
ATTENTION: dict[str, Table] = {
    "joint": _both("attn.qkv", "attn.qkv"),
    "grouped": {f"attn.qkv.{kind}": tuple(f"attn.{part}_proj.{kind}" for part in "qkv") for kind in ("weight", "bias")},
}
OPTIONAL: dict[str, Table] = {
    "attention_sinks": {"attn.sinks": "attn.sinks"},
    "qk_norm": {"attn.q_norm.weight": "attn.q_norm.weight", "attn.k_norm.weight": "attn.k_norm.weight"},
    "rmsnorm": {"norm1.weight": "norm1.weight", "norm2.weight": "norm2.weight"},
}

# Layers of a feed-forward network by naming style. A plus joins two of our tensors that are one reference tensor.
FEED_FORWARD: dict[str, Table] = {
    "fc": {**_both("up_proj", "fc1"), **_both("down_proj", "fc2")},
    "proj": {f"{name}.weight": f"{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")},
    "w12": {
        "gate_proj.weight+up_proj.weight": "w12.weight",
        "gate_proj.bias+up_proj.bias": "w12.bias",
        **_both("down_proj", "w3"),
    },
}
EXPERTS: dict[str, Table] = {
    "fc": {"w_in": "fc1.weight", "b_in": "fc1.bias", "w_out": "fc2.weight", "b_out": "fc2.bias"},
    "proj": {"w_in": ("gate_proj.weight", "up_proj.weight"), "w_out": "down_proj.weight"},
    "w12": {"w_in": "w12.weight", "b_in": "w12.bias", "w_out": "w3.weight", "b_out": "w3.bias"},
}
GATE: Table = {"router.weight": "gate_weight"}
ROUTER: dict[str, Table] = {
    "tc": {"router.weight": "gate.weight"},
    "ec": GATE,
    "diffmoe": {
        **GATE,
        "router.threshold": "expert_threshold",
        **_both("router.predictor.0", "capacity_predictor.0"),
        **_both("router.predictor.2", "capacity_predictor.2"),
    },
    "dsmoe": {"router.weight": "gate.weight", "router.e_score_correction_bias": "gate.e_score_correction_bias"},
}


def make_layout(kind: str, config: ModelConfig) -> Layout:
    """Table of names of one format for one architecture."""
    is_jit = kind == "jit"
    rows = [_row(ours, theirs) for ours, theirs in ENDS.items() if config.num_classes or ours != "y_embedder.weight"]
    rows += JIT_ENDS if is_jit else LATENT_ENDS
    if config.adds_sincos:
        rows.append(_row("pos_embed", "pos_embed", form="lead"))
    if is_jit and config.class_tokens:
        rows.append(_row("class_positions", "in_context_posemb", form="lead"))
    if is_jit and config.norm == "rmsnorm":
        rows.append(_row("final_layer.norm.weight", "final_layer.norm_final.weight"))
    constants: dict[str, torch.Tensor] = {}
    reference_rows: dict[str, int] = {}
    for n in range(config.depth):
        rows += _block_rows(kind, config, n)
        for part, heads in zip("qkv", (config.num_heads, config.num_kv_heads, config.num_kv_heads)):
            if heads is not None:
                sizes = dict.fromkeys(("weight", "bias"), heads * config.head_width)
                reference_rows |= {f"blocks.{n}.attn.{part}_proj.{name}": size for name, size in sizes.items()}
        if config.router == "diffmoe" and is_moe_block(config, n):
            constants[f"blocks.{n}.mlp.ema_decay"] = torch.tensor([config.threshold_decay])
    patch = (config.in_channels, config.patch_size, config.patch_size)
    return Layout(rows, config.num_experts, patch, reference_rows, constants)


LATENT_ENDS = [
    Row(("x_embedder.weight",), ("x_embedder.proj.weight",), "patch"),
    Row(("x_embedder.bias",), ("x_embedder.proj.bias",)),
]
JIT_ENDS = [
    Row(("x_embedder.proj1.weight",), ("x_embedder.proj1.weight",), "patch"),
    Row(("x_embedder.proj2.weight",), ("x_embedder.proj2.weight",), "pointwise"),
    Row(("x_embedder.proj2.bias",), ("x_embedder.proj2.bias",)),
]


def _block_rows(kind: str, config: ModelConfig, n: int) -> list[Row]:
    block = f"blocks.{n}."
    tables = [BLOCK, ATTENTION["joint" if config.num_kv_heads is None else "grouped"]]
    switches = {"attention_sinks": config.attention_sinks, "qk_norm": config.qk_norm}
    switches["rmsnorm"] = config.norm == "rmsnorm"
    tables += [OPTIONAL[name] for name, on in switches.items() if on]
    rows = [_row(ours, theirs, block, block) for table in tables for ours, theirs in table.items()]
    ours, theirs = f"{block}mlp.", f"{block}{'moe' if kind == 'dit-moe' else 'mlp'}."
    if not is_moe_block(config, n):
        return rows + _rows(FEED_FORWARD[_dialect(kind, config.mlp_activation)], ours, theirs)
    rows += _rows(ROUTER[config.router], ours, theirs)
    if config.shared in ("gelu", "swiglu"):
        rows += _rows(FEED_FORWARD[_dialect(kind, config.shared)], f"{ours}shared.", f"{theirs}shared_experts.")
    prefix = f"{theirs}experts.{'blocks.' if kind in ('dsmoe', 'jit') else ''}{{e}}."
    for name, parts in EXPERTS[_dialect(kind, config.expert_activation)].items():
        form: Form = "experts" if name.startswith("w_") else "expert_biases"
        rows.append(_row(name, parts, f"{ours}experts.", prefix, form))
    return rows


def _dialect(kind: str, activation: str) -> str:
    """Naming style of a feed-forward network's layers."""
    return "w12" if kind == "jit" else {"swiglu": "proj", "gelu": "fc", "silu": "fc"}[activation]


def _rows(table: Table, ours: str, theirs: str) -> list[Row]:
    return [_row(mine, yours, ours, theirs) for mine, yours in table.items()]


def _row(
    ours: str, theirs: str | tuple[str, ...], our_prefix: str = "", their_prefix: str = "", form: Form = "same"
) -> Row:
    parts = (theirs,) if isinstance(theirs, str) else theirs
    return Row(tuple(our_prefix + name for name in ours.split("+")), tuple(their_prefix + name for name in parts), form)


# Ends of names by which a format is detected; the first that is found counts.
SIGNS: dict[str, str] = {
    "x_embedder.proj1.weight": "jit",
    ".moe.gate.weight": "dit-moe",
    ".expert_threshold": "diffmoe",
    ".e_score_correction_bias": "dsmoe",
    ".gate_weight": "ec",
    ".mlp.gate.weight": "tc",
}


def detect_format(names: Iterable[str]) -> str | None:
    """The format of a state dict; None for a dense one, whose names `dense`, `dit` and `sit` share."""
    names = list(names)
    return next((kind for sign, kind in SIGNS.items() if any(name.endswith(sign) for name in names)), None)
