"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: put into a model, merged, saved, and loaded again."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..moe import GroupedExperts
from .backbone import Backbone

LABEL_TABLE = "y_embedder"
"""As a target: the label table, which is trained whole."""
WEIGHTS, TABLE = "pytorch_lora_weights.safetensors", "label_table.safetensors"
"""Files of a folder of adapters: diffusers' name for theirs, and ours for the label table."""
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the configuration."""


class Targets(NamedTuple):
    """What gets adapters."""

    layers: list[str]
    """Ends of names of linear layers."""
    stacks: list[str]
    """Ends of names of stacked weights of experts."""
    label_table: bool
    """Whether the label table is trained whole."""


def targets_of(model: nn.Module, names: Sequence[str]) -> Targets:
    """Which layers some names stand for: each a name or the end of some, as `attn.qkv`.

    Raises:
        ValueError: a name stands for nothing.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    experts = [name for name, module in model.named_modules() if isinstance(module, GroupedExperts)]
    stacks = [f"{name}.{stack}" for name in experts for stack in ("w_in", "w_out")]
    targets = Targets([], [], LABEL_TABLE in names and getattr(model, LABEL_TABLE, None) is not None)
    for name in names:
        if _ends(layers, name):
            targets.layers.append(name)
        elif _ends(stacks, name):
            targets.stacks.append(name)
        elif not (name == LABEL_TABLE and targets.label_table):
            known = sorted({_in_block(full) for full in (*layers, *stacks, LABEL_TABLE)})
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise ValueError(f"init.lora_targets has {name}, the end of no layer's name; take {', '.join(near)}")
    return targets


def add_adapters(model: Backbone, rank: int, alpha: float | None, names: Sequence[str]) -> None:
    """Put fresh adapters into a model, which then alone learn; they start as nothing.

    Args:
        alpha: adapters are multiplied by alpha / rank; None: by 1. names: see `targets_of`.

    Raises:
        ValueError: a name stands for nothing, or peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"adapters of rank {rank} need the package peft, which is not installed") from error
    targets = targets_of(model, names)
    if targets.layers or targets.stacks:
        model.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha or rank,  # type: ignore[arg-type]  # any number will do
                target_modules=targets.layers,
                target_parameters=targets.stacks,
            )
        )
    else:
        raise ValueError(f"init.lora_targets are {', '.join(names)}; name at least one layer that gets adapters")
    if targets.label_table:
        model.get_submodule(LABEL_TABLE).requires_grad_(True)


def merged(model: Backbone) -> Backbone:
    """A copy with its adapters added to its weights, and no adapters."""
    whole = copy.deepcopy(model)
    whole.fuse_lora()
    whole.unload_lora()
    return whole


def save_adapters(model: Backbone, folder: Path, label_table: bool = False) -> None:
    """Write a model's adapters, and its label table where that was trained too."""
    model.save_lora_adapter(folder)
    if label_table:
        table = model.get_submodule(LABEL_TABLE).state_dict()
        save_file({f"{LABEL_TABLE}.{name}": t.contiguous() for name, t in table.items()}, folder / TABLE)


def load_lora(model: Backbone, folder: Path | str) -> None:
    """Put saved adapters into the model that they were trained on; also those of experts, and a label table.

    Raises:
        ValueError: there are none in the folder, or they are of another model.

    Example:
        >>> model = DiT.from_pretrained("base")
        >>> load_lora(model, "runs/tuned/lora")
    """
    from peft import LoraConfig, set_peft_model_state_dict

    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            config = LoraConfig(**json.loads((file.metadata() or {})[METADATA]))
        state, table = load_file(path), Path(folder) / TABLE
        if table.is_file():
            (rows,) = load_file(table).values()
            classes = len(rows) - int(model.settings.null_class)
            model.y_embedder = nn.Embedding.from_pretrained(rows, freeze=True)
            model.settings = dataclasses.replace(model.settings, num_classes=classes)
            model.register_to_config(num_classes=classes)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read adapters from {path}: {' '.join(str(error).split())}") from error
    try:
        model.add_adapter(config)
        unknown = set_peft_model_state_dict(model, state).unexpected_keys  # type: ignore[attr-defined]
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the adapters in {path} are of another model: {' '.join(str(error).split())[:200]}"
        ) from error
    if unknown:
        raise ValueError(f"the adapters in {path} are of another model: it has no {unknown[0]}")


def _ends(names: Sequence[str], end: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for name in names)


def _in_block(name: str) -> str:
    """A name without the number of its block."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name
