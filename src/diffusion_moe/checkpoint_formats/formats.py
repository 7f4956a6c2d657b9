"""The reference formats as tables of names. {e} is an expert's number."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..config import ModelConfig
from ..counts import is_moe_block
from .layout import Form, Layout, Row

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


def _both(ours: str, theirs: str | None = None) -> Table:
    """Weight and bias of a layer; the same names there unless they are given."""
    return {f"{ours}.{kind}": f"{theirs or ours}.{kind}" for kind in ("weight", "bias")}


def _same(*names: str) -> Table:
    return {name: name for name in names}


ENDS: Table = {
    **_both("t_embedder.mlp.0"),
    **_both("t_embedder.mlp.2"),
    **_both("final_layer.linear"),
    **_both("final_layer.adaln.1", "final_layer.adaLN_modulation.1"),
}
LATENT_ENDS = _both("x_embedder", "x_embedder.proj")
JIT_ENDS = _same("x_embedder.proj1.weight") | _both("x_embedder.proj2")
FORMS: dict[str, Form] = {
    "x_embedder.weight": "patch",
    "x_embedder.proj1.weight": "patch",
    "x_embedder.proj2.weight": "pointwise",
    "pos_embed": "lead",
    "class_positions": "lead",
    **dict.fromkeys(("w_in", "b_in", "w_out", "b_out"), "experts"),
}
"""Differences of shape by our names."""
BLOCK: Table = {**_both("attn.proj"), **_both("adaln.1", "adaLN_modulation.1")}
ATTENTION: dict[str, Table] = {
    "joint": _both("attn.qkv"),
    "grouped": {f"attn.qkv.{kind}": tuple(f"attn.{part}_proj.{kind}" for part in "qkv") for kind in ("weight", "bias")},
}

# Layers of a feed-forward network by naming style. A plus joins two of our tensors that are one reference tensor.
FEED_FORWARD: dict[str, Table] = {
    "fc": {**_both("up_proj", "fc1"), **_both("down_proj", "fc2")},
    "proj": _same("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
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
ROUTER: dict[str, Table] = {
    "tc": {"router.weight": "gate.weight"},
    "ec": {"router.weight": "gate_weight"},
    "diffmoe": {
        "router.weight": "gate_weight",
        "router.threshold": "expert_threshold",
        **_both("router.predictor.0", "capacity_predictor.0"),
        **_both("router.predictor.2", "capacity_predictor.2"),
    },
    "dsmoe": {"router.weight": "gate.weight", "router.e_score_correction_bias": "gate.e_score_correction_bias"},
}


def make_layout(kind: str, config: ModelConfig) -> Layout:
    """Table of names of one format for one architecture."""
    is_jit = kind == "jit"
    ends = ENDS | (JIT_ENDS if is_jit else LATENT_ENDS)
    if config.num_classes:
        ends["y_embedder.weight"] = "y_embedder.embedding_table.weight"
    if config.adds_sincos:
        ends |= _same("pos_embed")
    if is_jit and config.class_tokens:
        ends["class_positions"] = "in_context_posemb"
    if is_jit and config.norm == "rmsnorm":
        ends["final_layer.norm.weight"] = "final_layer.norm_final.weight"
    rows = _rows(ends)
    constants: dict[str, torch.Tensor] = {}
    for n in range(config.depth):
        rows += _block_rows(kind, config, n)
        if config.router == "diffmoe" and is_moe_block(config, n):
            constants[f"blocks.{n}.mlp.ema_decay"] = torch.tensor([config.threshold_decay])
    patch = (config.in_channels, config.patch_size, config.patch_size)
    kv_heads = config.num_kv_heads or config.num_heads
    heads = {"q_proj": config.num_heads, "k_proj": kv_heads, "v_proj": kv_heads}
    reference_rows = {layer: number * config.head_width for layer, number in heads.items()}
    return Layout(rows, config.num_experts, patch, reference_rows, constants)


def _block_rows(kind: str, config: ModelConfig, n: int) -> list[Row]:
    block = f"blocks.{n}."
    table = BLOCK | ATTENTION["joint" if config.num_kv_heads is None else "grouped"]
    if config.attention_sinks:
        table |= _same("attn.sinks")
    if config.qk_norm:
        table |= _same("attn.q_norm.weight", "attn.k_norm.weight")
    if config.norm == "rmsnorm":
        table |= _same("norm1.weight", "norm2.weight")
    rows = _rows(table, block, block)
    ours, theirs = f"{block}mlp.", f"{block}{'moe' if kind == 'dit-moe' else 'mlp'}."
    if not is_moe_block(config, n):
        return rows + _rows(FEED_FORWARD[_dialect(kind, config.mlp_activation)], ours, theirs)
    rows += _rows(ROUTER[config.router], ours, theirs)
    if config.shared in ("gelu", "swiglu"):
        rows += _rows(FEED_FORWARD[_dialect(kind, config.shared)], f"{ours}shared.", f"{theirs}shared_experts.")
    prefix = f"{theirs}experts.{'blocks.' if kind in ('dsmoe', 'jit') else ''}{{e}}."
    return rows + _rows(EXPERTS[_dialect(kind, config.expert_activation)], f"{ours}experts.", prefix)


def _dialect(kind: str, activation: str) -> str:
    """Naming style of a feed-forward network's layers."""
    return "w12" if kind == "jit" else {"swiglu": "proj", "gelu": "fc", "silu": "fc"}[activation]


def _rows(table: Table, our_prefix: str = "", their_prefix: str = "") -> list[Row]:
    rows = []
    for ours, theirs in table.items():
        parts = (theirs,) if isinstance(theirs, str) else theirs
        our_names = tuple(our_prefix + name for name in ours.split("+"))
        rows.append(Row(our_names, tuple(their_prefix + name for name in parts), FORMS.get(ours, "same")))
    return rows


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
