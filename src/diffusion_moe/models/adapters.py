"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: adding, merging, saving and loading."""

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
"""Name of the label table, which as a target is trained as a whole."""
WEIGHTS, TABLE = "pytorch_lora_weights.safetensors", "label_table.safetensors"
"""Files of a folder of adapters: the adapters, as diffusers names them, and the label table."""
METADATA = "lora_adapter_metadata"
"""Key of the configuration in the metadata of the file, as in diffusers."""


class Targets(NamedTuple):
    """Parts of a model to train with adapters."""

    layers: list[str]
    """Ends of names of linear layers."""
    stacks: list[str]
    """Ends of names of stacked weights of experts."""
    label_table: bool
    """Train the label table as a whole."""


def targets_of(model: nn.Module, names: Sequence[str]) -> Targets:
    """Layers and weights whose names end in the given names, such as `attn.qkv`.

    Raises:
        ValueError: no name of the model ends in one of the names.
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
            raise ValueError(
                f"init.lora_targets has {name}, but no layer's name ends in it; choose from {', '.join(near)}"
            )
    return targets


def add_adapters(model: Backbone, rank: int, alpha: float | None, names: Sequence[str]) -> None:
    """Add new adapters to a model and freeze all else. They change nothing until they are trained.

    Args:
        model: the model.
        rank: rank of the adapters.
        alpha: adapters are multiplied by alpha / rank; None: by 1.
        names: targets; see `targets_of`.

    Raises:
        ValueError: no name of the model ends in one of the names, or peft is not installed.
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
    """A copy of the model with its adapters merged into its weights."""
    whole = copy.deepcopy(model)
    whole.fuse_lora()
    whole.unload_lora()
    return whole


def save_adapters(model: Backbone, folder: Path, label_table: bool = False) -> None:
    """Write a model's adapters, and its label table if that was trained too."""
    model.save_lora_adapter(folder)
    if label_table:
        table = model.get_submodule(LABEL_TABLE).state_dict()
        save_file({f"{LABEL_TABLE}.{name}": t.contiguous() for name, t in table.items()}, folder / TABLE)


def load_lora(model: Backbone, folder: Path | str) -> None:
    """Load saved adapters, also those of experts, and a label table into the model that they were trained on.

    Raises:
        ValueError: the folder has no readable adapters, or they are for another model.

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
            f"the adapters in {path} are for another model: {' '.join(str(error).split())[:200]}"
        ) from error
    if unknown:
        raise ValueError(f"the adapters in {path} are for another model: it has no {unknown[0]}")


def _ends(names: Sequence[str], end: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for name in names)


def _in_block(name: str) -> str:
    """The name without the number of its block."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name
