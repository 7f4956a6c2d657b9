"""Conversion of reference checkpoints (files of the papers' code) to models, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from ..config import ModelConfig, Process, find_recipe, read_recipe, read_yaml, recipe_names
from ..models import Backbone, make_model
from ..storage.files import sha256
from .files import Checkpoint, Weights, find_file, read_checkpoint, write_checkpoint
from .formats import FORMATS, detect_format, make_layout
from .layout import from_reference, to_reference
from .settings import Settings, check_writable, read_settings, write_settings


class Converted(NamedTuple):
    """A reference checkpoint as a model of this library."""

    model: Backbone
    """The model in eval mode, on the CPU."""
    record: dict[str, Any]
    """Metadata of the file."""


def read_reference_checkpoint(
    source: str,
    config: str | None = None,
    weights: Weights = "ema",
    kind: str | None = None,
    file: str | None = None,
    trust_pickle: bool = False,
) -> Converted:
    """Read a reference checkpoint.

    Args:
        source: its file, a folder that contains it, or a hub id.
        config: the YAML file it was trained with, or a recipe (a file, or the name of a shipped one); None: found in
            its folder, known from its hub id or its own arguments, or inferred from its shapes.
        weights: the set of weights to read.
        kind: key of `FORMATS`; None: inferred from config and names.
        file: name of the file in the folder.
        trust_pickle: read a file with more than tensors, which can run any code.

    Raises:
        ValueError: the file cannot be read or does not fit its architecture.
    """
    path = find_file(source, file)
    checkpoint = read_checkpoint(path, weights, trust_pickle)
    detected = detect_format(checkpoint.state)
    _check_format(kind or detected)
    if kind and detected not in (kind, None):
        raise ValueError(f"--format is {kind}, but the names in {path} are those of {detected}")
    try:
        kind, settings = _settings(source, path, checkpoint, config, kind or detected)
        architecture = ModelConfig(**settings | _threshold_decay(checkpoint.state))
    except (TypeError, AttributeError, KeyError, IndexError) as error:  # such as a number instead of a mapping
        raise ValueError(f"the architecture of {path} cannot be read: {error}; give it with --config") from error
    with torch.device("meta"):  # its tensors are replaced by those of the file
        model = make_model(architecture)
    model.register_positions()
    converted = from_reference(make_layout(kind, architecture), checkpoint.state)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name, value in converted.items():
        if name not in expected or value.shape != expected[name]:
            shape = tuple(expected[name]) if name in expected else "nothing"
            raise ValueError(f"{path} gives {name} of shape {tuple(value.shape)}, but its architecture expects {shape}")
    model.load_state_dict(converted, assign=True)
    record = {"format": kind, "source": source, "file": path.name, "sha256": sha256(path)}
    return Converted(model.eval(), record | {"weights": checkpoint.weights})


def _check_format(kind: str | None) -> None:
    if kind not in (None, *FORMATS):
        raise ValueError(f"the format is {kind!r}; choose one of {', '.join(FORMATS)}")


def _threshold_decay(state: Mapping[str, Tensor]) -> Settings:
    """The decay of the thresholds, which DiffMoE's checkpoints contain in float32."""
    value = next((float(value) for name, value in state.items() if name.endswith(".ema_decay")), None)
    if value is None:
        return {}
    short = float(f"{value:.6g}")
    return {"threshold_decay": short if torch.tensor(short) == torch.tensor(value) else value}


def write_reference_checkpoint(model: Backbone, path: Path, kind: str | None = None) -> str:
    """Write a model as a reference checkpoint, and a YAML file of its architecture if the reference code reads one.

    Args:
        kind: key of `FORMATS`; None: chosen by the model's backbone and router.

    Returns:
        The format.

    Raises:
        ValueError: the reference code has no such model.
    """
    config = model.settings
    kind = kind or ("jit" if config.backbone == "jit" else "dense" if config.router == "dense" else config.router)
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"output is {path}; a reference checkpoint ends in .pt, .pth or .safetensors")
    _check_format(kind)
    params, moe = write_settings(kind, config) if kind in TARGETS or kind == "jit" else ({}, None)
    state = to_reference(make_layout(kind, config), model.state_dict())
    if kind in NOT_IN_SHAPES:
        not_in_shapes = {name: getattr(config, name) for name in NOT_IN_SHAPES[kind]}
        check_writable(kind, config, ModelConfig(**infer_settings(kind, state) | not_in_shapes))
    write_checkpoint(path, kind, state)
    if kind in TARGETS:
        section = {"ckpt": None, "target": TARGETS[kind], "params": params | ({"MoE_config": moe} if moe else {})}
        content = {"basic": {"rf": config.process == "flow"}, "model": section}
        path.with_suffix(".yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return kind


NOT_IN_SHAPES: dict[str, tuple[str, ...]] = {"dit": (), "sit": (), "dit-moe": ("process", "prediction", "top_k")}
"""Formats whose settings are inferred from shapes, and the settings that no shape shows."""
TARGETS = {
    "dense": "models.models_DiT.DiT",
    "tc": "models.models_TCDiT.DiT",
    "ec": "models.models_ECDiT.DiT",
    "diffmoe": "models.models_DiffMoE.DiT",
    "dsmoe": "models.models_DSMoE.DiT",
}
"""Names of the architectures in the reference YAML files."""

HUB_NAME = re.compile(r"(?:^|/)(?:YHLLEO/)?(DSMoE-\w+-E\d+|JiTMoE-[BLH]16-E\d+)$", re.IGNORECASE)


def _settings(
    source: str, path: Path, checkpoint: Checkpoint, config: str | None, kind: str | None
) -> tuple[str, Settings]:
    """The format, and the fields of `ModelConfig`."""
    config = config or _find_config(source, path)
    if config is not None:
        content: Any = read_yaml(Path(config)) if Path(config).is_file() else None
        if is_reference(content):
            return _from_yaml(config, content, kind)
        settings = vars(read_recipe(find_recipe(config)).model)
        if kind is None and settings["router"] != "dense":
            raise ValueError(f"the format of {path} cannot be inferred from its names; give it with --format")
        return kind or "dense", settings
    if kind == "jit":
        return kind, _from_jit_arguments(path, checkpoint.arguments)
    if kind in NOT_IN_SHAPES:
        return kind, infer_settings(kind, checkpoint.state)
    if kind is None:
        remedy = "give --format dit or sit, or --config"
        raise ValueError(f"{path} has the names of a dense DiT, which several formats share; {remedy}")
    remedy = "give the YAML file it was trained with, or a recipe, with --config"
    raise ValueError(f"{path} does not contain its architecture; {remedy}")


def _find_config(source: str, path: Path) -> str | None:
    """YAML file of the checkpoint, or the only one in its folder or the parent folder, or a known hub id's recipe."""
    if path.with_suffix(".yaml").is_file():
        return str(path.with_suffix(".yaml"))
    for folder in (path.parent, path.parent.parent):
        files = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
        if len(files) == 1 and is_reference(read_yaml(files[0])):
            return str(files[0])
    known = HUB_NAME.search(source.rstrip("/"))
    name = re.sub(r"^jitmoe-([blh])16", r"jitmoe-\1-16", known[1].lower()) if known else ""
    return name if name in recipe_names() else None


def is_reference(content: Any) -> bool:
    """True if the content of a YAML file is a configuration of the reference code."""
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, dict) and "target" in model


def _from_yaml(config: str, content: Mapping[str, Any], kind: str | None) -> tuple[str, Settings]:
    model = content["model"]
    kinds = {target: name for name, target in TARGETS.items()}
    named = kinds.get(model["target"])
    if named is None:
        raise ValueError(f"{config}: model.target is {model['target']}; this library reads {', '.join(kinds)}")
    if kind not in (named, None) and not (named == "dense" and kind in ("dit", "sit")):
        raise ValueError(f"{config} describes a {named} model, but the checkpoint's names are those of {kind}")
    params = dict(model.get("params") or {})
    moe = params.pop("MoE_config", None)
    process: Process = "flow" if (content.get("basic") or {}).get("rf", False) else "ddpm"
    return named, read_settings(named, params, moe, process)


def _from_jit_arguments(path: Path, arguments: Mapping[str, Any]) -> Settings:
    """Settings from the arguments of the training command, which JiT's checkpoints contain."""
    name = str(arguments.get("model", ""))
    recipe = re.sub(r"^jit-(\w)/(\d+)-e", r"jitmoe-\1-\2-e", name.lower()).replace("/", "-")
    if recipe not in recipe_names():
        raise ValueError(f"{path} says its model is {name or 'nothing'}, which is no recipe; give one with --config")
    settings = vars(read_recipe(recipe).model)
    given = {
        "sample_size": arguments.get("img_size"),
        "num_classes": arguments.get("class_num"),
        "dropout": arguments.get("proj_dropout"),
        "attention_dropout": arguments.get("attn_dropout"),
        "min_gap": arguments.get("t_eps"),
        "noise_scale": arguments.get("noise_scale"),
    }
    return settings | {key: value for key, value in given.items() if value is not None}


HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1408: 16}
"""Attention heads by width, of the sizes S, B, L, XL and G; no shape shows them."""


def infer_settings(kind: str, state: Mapping[str, Tensor]) -> Settings:
    """Fields of `ModelConfig` from the shapes of a DiT, SiT or DiT-MoE.

    Raises:
        ValueError: a tensor is missing, or the width is none of the reference sizes.
    """
    try:
        dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens, rows = state["pos_embed"].shape[1], len(state["y_embedder.embedding_table.weight"])
        out = len(state["final_layer.linear.weight"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"the checkpoint is no {FORMATS[kind]}: it lacks {error}") from error
    if dim not in HEADS:
        remedy = "give its architecture with --config"
        raise ValueError(f"the checkpoint has width {dim}, which is no reference size; {remedy}")
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    params = {
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "learn_sigma": out == 2 * channels * patch * patch,
        "hidden_size": dim,
        "depth": len(blocks),
        "num_heads": HEADS[dim],
        "num_classes": rows - 1,
    }
    settings = read_settings("dense", params, None, "flow" if kind == "sit" else "ddpm")
    if kind != "dit-moe":
        return settings | {"mlp_dim": len(state["blocks.0.mlp.fc1.bias"])}
    experts = {name.split(".")[4] for name in state if name.startswith("blocks.0.moe.experts.")}
    return settings | {
        "router": "tc",
        "top_k": 2,  # in all reference models; no shape shows it
        "num_experts": len(experts),
        "expert_dim": len(state["blocks.0.moe.experts.0.up_proj.weight"]),
        "shared": "swiglu",
        "shared_dim": len(state["blocks.0.moe.shared_experts.up_proj.weight"]),
        "balance": "aux",
        "moe_layer_freq": 1,
    }
